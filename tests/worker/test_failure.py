"""A failure that a request's values cause is explained to the client; one of the server's is not blamed on it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from safelight.protocol.child_config import ChildConfig
from safelight.protocol.codec import Buffer
from safelight.protocol.config import Config
from safelight.protocol.errors import InvalidRequest
from safelight.protocol.generation import Failed, Generate, Image, Result, Sample
from safelight.protocol.messages import FromWorker
from safelight.protocol.replicas import Parameter
from safelight.server.model_limits import check_model
from safelight.server.schemas import GenerateBody
from safelight.tests.tiny import FAMILIES
from safelight.worker.forward.batcher import Batcher
from safelight.worker.model.model import Model
from safelight.worker.model.pipeline_task import new_task
from safelight.worker.rank.rank_process import RankProcess
from safelight.worker.requests.failure import NotFinite, explain
from safelight.worker.requests.jobs import Jobs

PICTURE = Image(64, 64, Buffer(bytes(range(256)) * 48))


class Stage:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.batcher = Batcher(max_batch=16, max_tokens=10**6)
        self.sent: list[FromWorker] = []
        self.jobs = Jobs(model, self.batcher, self.sent.append)

    def ask(self, **given: Any) -> Failed | Result:
        fields = {"num_inference_steps": 2, "width": 64, "height": 64, "output_format": "pt"} | given
        self.jobs.submit(Generate(request_id="asked", samples=[Sample("a star", 1)], **fields))
        while self.batcher.busy or self.jobs.stats().running:
            self.batcher.step()
            for request_id in self.jobs.collect():
                self.jobs.drop(request_id)
        answer = self.sent.pop()
        assert isinstance(answer, Failed | Result)
        return answer

    def refusal(self, **given: Any) -> Any:
        answer = self.ask(**given)
        assert isinstance(answer, Failed)
        return answer.error


@pytest.fixture
def stage(tiny_model: Callable[[str], Model]) -> Iterator[Callable[[str], Stage]]:
    made: list[Stage] = []

    def make(name: str) -> Stage:
        made.append(Stage(tiny_model(name)))
        return made[-1]

    yield make
    for one in made:
        one.jobs.close()


def odd_values(parameter: Parameter) -> list[Any]:
    odd: dict[str, list[Any]] = {
        "int": [-1, 2**63 - 1],
        "float": [-1.0, 1e-9, 1e300],
        "list": [[-1, 0], [1e300] * 3, [2**63 - 1] * 2],
        "str": ["\x00"],
    }
    return [value for kind in parameter.types for value in odd.get(kind, [])]


@pytest.mark.parametrize("name", ["flux", "sd15", "sdxl", "wan", "sana"])
def test_no_value_of_any_offered_argument_is_a_fault_of_the_server(name: str, stage: Callable[[str], Stage]) -> None:
    played, tried = stage(name), 0
    call, info, config = FAMILIES[name].call, played.model.info(), Config()
    small = {"num_inference_steps": 1} | {key: call[key] for key in ("width", "height", "num_frames") if key in call}
    for argument, parameter in played.model.main.arguments.items():
        for value in odd_values(parameter):
            body = GenerateBody(prompt=["a star"], extra={argument: value})
            try:
                check_model(body, 0, info, config)
            except InvalidRequest:
                continue  # refused before any work, as fields of the request itself are
            answer = played.ask(**small, extra={argument: value})
            tried += 1
            if isinstance(answer, Failed):
                assert answer.error.status == 400, (argument, value, answer.error)
                assert f"extra.{argument}" in answer.error.message, (value, answer.error)
    assert tried


def test_steps_that_are_too_few_for_the_scheduler_are_named_with_what_it_said(stage: Callable[[str], Stage]) -> None:
    played = stage("sd15")
    played.model.pipeline.scheduler = diffusers.PNDMScheduler()
    error = played.refusal(num_inference_steps=1)
    assert (error.status, error.field) == (400, "num_inference_steps") or "num_inference_steps = 1" in error.message
    assert "Error" in error.message
    assert "Traceback" not in error.message
    assert isinstance(played.ask(num_inference_steps=4), Result)


@pytest.mark.parametrize("number", [1e30, 1e39])
def test_numbers_that_make_no_finite_picture_are_named_and_harm_nobody_else(
    number: float, stage: Callable[[str], Stage]
) -> None:
    played = stage("sd15")
    error = played.refusal(guidance_scale=number)
    assert (error.status, error.field) == (400, "guidance_scale")
    assert f"guidance_scale = {number}" in error.message
    assert isinstance(played.ask(guidance_scale=5.0), Result)


def test_weights_that_are_not_finite_are_nobody_s_numbers(stage: Callable[[str], Stage]) -> None:
    played = stage("sd15")
    assert isinstance(played.ask(guidance_scale=5.0), Result)
    next(played.model.pipeline.unet.parameters()).fill_(float("nan"))
    played.jobs.set_version("after an update")
    assert played.refusal(guidance_scale=5.0).status == 500


def test_a_strength_too_small_for_one_step_is_refused_in_words(stage: Callable[[str], Stage]) -> None:
    played = stage("sdxl")
    cls = diffusers.StableDiffusionXLImg2ImgPipeline
    played.model.image = new_task(cls(**played.model.pipeline.components), Config(), {})
    error = played.refusal(images=[PICTURE], extra={"strength": 1e-9})
    assert (error.status, error.field) == (400, "extra.strength")
    assert "1e-09" in error.message


def raised_in(module: str, text: str, kind: type[Exception] = ValueError) -> Exception:
    """An error out of a function of ``module``."""
    names: dict[str, Any] = {"__name__": module, "error": kind(text)}
    exec("def refuse():\n    raise error", names)
    try:
        names["refuse"]()
    except Exception as error:  # noqa: BLE001  # any
        return error
    raise AssertionError("it raises")


def asked(**given: Any) -> Generate:
    return Generate(request_id="a", samples=[Sample("a", 1)], **given)


@pytest.mark.parametrize(
    "text", ["/home/me/model.bin is missing", "no C:\\model", "<Module at 0x7f00deadbeef>", "a\x1b[31mb"]
)
def test_a_server_s_paths_and_addresses_stay_its_own(text: str) -> None:
    reported = explain(raised_in("diffusers.pipelines", text), asked(guidance_scale=2.0), weights_are_sound=True)
    assert reported.status == 400
    assert reported.message.endswith("(ValueError)")


def test_the_argument_that_the_pipeline_speaks_of_is_the_one_that_is_named() -> None:
    error = raised_in("diffusers.pipelines", "`eta` must be below 1, but is 7")
    reported = explain(error, asked(guidance_scale=2.0, extra={"clip_skip": 1, "eta": 7}), weights_are_sound=True)
    assert reported.message == "the pipeline could not use extra.eta = 7 (ValueError: `eta` must be below 1, but is 7)"
    assert reported.field == "extra.eta"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (raised_in("safelight.worker.crossing.steps", "ours"), 500),
        (raised_in("diffusers.models", "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED", RuntimeError), 500),
        (raised_in("diffusers.models", "DefaultCPUAllocator: not enough memory: 9 bytes", RuntimeError), 503),
        (raised_in("diffusers.models", "CUDA out of memory", torch.OutOfMemoryError), 503),
        (raised_in("diffusers.models", "too large", OverflowError), 400),
        (NotFinite(), 400),
    ],
)
def test_only_what_the_libraries_say_of_values_is_blamed_on_them(error: Exception, status: int) -> None:
    assert explain(error, asked(guidance_scale=2.0), weights_are_sound=True).status == status


@pytest.mark.parametrize("error", [raised_in("diffusers.models", "no"), NotFinite()])
def test_a_request_that_gives_nothing_but_a_prompt_is_not_to_blame(error: Exception) -> None:
    assert explain(error, asked(), weights_are_sound=True).status == 500


def test_a_broken_device_is_blamed_on_nobody_and_ends_the_turn(
    stage: Callable[[str], Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    played = stage("flux")

    def broken(*_: object, **__: object) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(played.model.pipeline.transformer, "forward", broken)
    with pytest.raises(torch.AcceleratorError):
        played.ask(guidance_scale=2.0, extra={"max_sequence_length": 16})
    assert played.sent == []


def test_a_replica_leaves_with_status_1_when_its_device_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: RankProcess) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(RankProcess, "_load", broken)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert RankProcess(ChildConfig(config=Config(), directory=str(tmp_path), replica=0)).run() == 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
