"""Requests on a real model, from the message that starts them to the message that ends them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load

from safelight.protocol.generation import Failed, Generate, Preview, Progress, Result, Sample
from safelight.protocol.messages import FromWorker
from safelight.protocol.rollouts import Rollout
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.collate import collate
from safelight.worker.model.model import Model
from safelight.worker.requests import encoding_threads
from safelight.worker.requests.jobs import Jobs


class Stage:
    """Jobs on the tiny FLUX, with the messages that they sent."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.sent: list[FromWorker] = []
        self.batcher = Batcher(max_batch=16, max_tokens=10**6)
        self.jobs = Jobs(model, self.batcher, self.sent.append)

    def settle(self) -> list[FromWorker]:
        """Run until every request has ended; returns what was sent and forgets it."""
        deadline = time.monotonic() + 60
        while self.batcher.busy or self.jobs.stats().running:
            self.batcher.step()
            for request_id in self.jobs.collect():
                self.jobs.drop(request_id)
            assert time.monotonic() < deadline
        sent, self.sent[:] = self.sent[:], []
        return sent


@pytest.fixture
def stage(tiny_model: Callable[[str], Model]) -> Iterator[Stage]:
    found = Stage(tiny_model("flux"))
    yield found
    found.jobs.close()


def generate(name: str, outputs: int = 1, **changes: object) -> Generate:
    fields = {"num_inference_steps": 3, "output_format": "pt", "width": 64, "height": 64} | changes
    samples = [Sample("a red circle", seed) for seed in range(outputs)]
    return Generate(request_id=name, samples=samples, **fields)  # type: ignore[arg-type]


def test_outputs_come_in_the_order_of_their_seeds(stage: Stage) -> None:
    stage.jobs.submit(generate("many", outputs=3))
    (together,) = stage.settle()
    assert isinstance(together, Result)
    assert [output.seed for output in together.outputs] == [0, 1, 2]
    pictures = [load(bytes(output.data))["t"] for output in together.outputs]
    assert not torch.equal(pictures[0], pictures[1])
    assert together.steps == 3


def test_a_finished_output_is_sent_while_a_forward_runs(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, decoded, forward_runs, sent = stage.model.pipeline.transformer, list[object](), Event(), list[int]()
    encode, forward = encoding_threads.encode, transformer.forward

    def late_encode(*args: Any) -> bytes:
        assert forward_runs.wait(60)
        return encode(*args)

    def long_forward(*args: object, **kwargs: object) -> object:
        if decoded:
            forward_runs.set()
            deadline = time.monotonic() + 60
            while not stage.sent and time.monotonic() < deadline:
                time.sleep(0.01)
            sent.append(len(stage.sent))
        return forward(*args, **kwargs)

    stage.model.pipeline.vae.decoder.register_forward_hook(lambda *_: decoded.append(None))
    monkeypatch.setattr(transformer, "forward", long_forward)
    monkeypatch.setattr(encoding_threads, "encode", late_encode)
    stage.jobs.submit(generate("short", num_inference_steps=1))
    stage.jobs.submit(generate("long"))
    assert [message.request_id for message in stage.settle() if isinstance(message, Result)] == ["short", "long"]
    assert sent[0] == 1


def test_a_result_that_cannot_be_sent_is_an_error_and_does_not_stay_in_progress(
    tiny_model: Callable[[str], Model],
) -> None:
    stage = Stage(tiny_model("flux"))
    send = stage.sent.append

    def without_results(message: FromWorker) -> None:
        if isinstance(message, Result):
            raise OverflowError("an integer of 65 bits")
        send(message)

    stage.jobs = Jobs(stage.model, stage.batcher, without_results)
    stage.jobs.submit(generate("unsendable"))
    deadline = time.monotonic() + 60
    ended: list[FromWorker] = []
    while not ended and time.monotonic() < deadline:
        stage.batcher.step()
        for request_id in stage.jobs.collect():
            stage.jobs.drop(request_id)
        ended = [*stage.sent]
    stage.jobs.close()
    (failed,) = ended
    assert isinstance(failed, Failed)
    assert failed.error.status == 500


def test_a_request_whose_outputs_all_fail_at_once_ends_once_and_harms_nobody(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stage.jobs.submit(generate("bad", outputs=4, extra={"max_sequence_length": 100_000}))
    stage.jobs.submit(generate("good"))
    ended = {message.request_id: message for message in stage.settle() if isinstance(message, Failed | Result)}
    bad = ended["bad"]
    assert isinstance(bad, Failed)
    assert (bad.error.status, "max_sequence_length" in bad.error.message) == (400, True)
    assert isinstance(ended["good"], Result)
    lines = [record for record in caplog.records if "output" in record.getMessage()]
    assert lines
    assert all(record.exc_info is None and record.levelno == logging.INFO for record in lines), "it is the client's"


def test_a_request_that_raises_inside_a_merged_forward_fails_alone(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    transformer = stage.model.pipeline.transformer
    forward = transformer.forward

    def picky(*args: object, guidance: torch.Tensor, **kwargs: object) -> object:
        if (guidance == 13).any():
            raise RuntimeError("thirteen")
        return forward(*args, guidance=guidance, **kwargs)

    stage.jobs.submit(generate("alone", guidance_scale=2.0))
    (alone,) = stage.settle()
    monkeypatch.setattr(transformer, "forward", picky)
    for name, scale in (("first", 2.0), ("bad", 13.0), ("last", 2.0)):
        stage.jobs.submit(generate(name, guidance_scale=scale))
    ended = {message.request_id: message for message in stage.settle() if isinstance(message, Failed | Result)}
    assert isinstance(ended["bad"], Failed)
    assert (ended["bad"].error.status, ended["bad"].error.field) == (400, "guidance_scale")
    assert "RuntimeError: thirteen" in ended["bad"].error.message, "what the component said of the request's value"
    assert isinstance(alone, Result)
    expected = load(bytes(alone.outputs[0].data))["t"]
    for name in ("first", "last"):
        good = ended[name]
        assert isinstance(good, Result)
        assert (load(bytes(good.outputs[0].data))["t"] - expected).abs().max() <= 1e-4
    assert "they run one by one" in caplog.text


def test_a_mistake_of_ours_within_a_forward_is_not_blamed_on_the_request(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage.model.pipeline.transformer, "forward", lambda *_, **__: collate([]))
    stage.jobs.submit(generate("asked", guidance_scale=2.0))
    (ended,) = [message for message in stage.settle() if isinstance(message, Failed | Result)]
    assert isinstance(ended, Failed)
    assert ended.error.status == 500


def test_a_cancelled_request_is_acknowledged_once_and_leaves_nothing_running(stage: Stage) -> None:
    stage.jobs.submit(generate("doomed", outputs=4, num_inference_steps=500))
    for _ in range(5):
        stage.batcher.step()
    stage.jobs.cancel("doomed")
    stage.jobs.cancel("doomed")
    assert [(type(message), message.request_id) for message in stage.settle()] == [(Failed, "doomed")]  # type: ignore[union-attr]
    assert not stage.batcher.busy
    assert stage.jobs.stats().cancelled == 1


def test_the_calls_that_run_alone_are_counted_among_the_facts(stage: Stage) -> None:
    assert stage.jobs.stats().unmergeable == {}
    stage.batcher.policy.unmergeable["vae.decode"] = "merged, it changes the picture"
    assert stage.jobs.stats().unmergeable == {"vae.decode": "merged, it changes the picture"}


def test_progress_and_previews_are_sent_only_when_asked_for(stage: Stage) -> None:
    stage.jobs.submit(generate("quiet"))
    assert [type(message) for message in stage.settle()] == [Result]
    stage.jobs.submit(generate("loud", num_inference_steps=5, progress=True, preview_every=2))
    sent = stage.settle()
    assert [message.step for message in sent if isinstance(message, Progress)] == [1, 2, 3, 4, 5]
    assert [message.step for message in sent if isinstance(message, Preview)] == [2, 4]
    assert isinstance(sent[-1], Result)


def test_previews_do_not_change_the_picture(stage: Stage) -> None:
    pictures = []
    for every in (0, 1):
        stage.jobs.submit(generate("same", preview_every=every, num_inference_steps=4))
        result = stage.settle()[-1]
        assert isinstance(result, Result)
        pictures.append(load(bytes(result.outputs[0].data))["t"])
    assert torch.equal(pictures[0], pictures[1])


@pytest.mark.parametrize(("component", "changes"), [("transformer", {}), ("text_encoder", {"encode": "embeddings"})])
def test_weights_that_are_not_finite_are_an_error_and_no_picture_or_embeddings(
    component: str, changes: dict[str, object], tiny_model: Callable[[str], Model]
) -> None:
    broken = tiny_model("flux")
    next(getattr(broken.pipeline, component).parameters()).fill_(float("nan"))
    other = Stage(broken)
    other.jobs.submit(generate("nan", **changes))
    (failed,) = other.settle()
    other.jobs.close()
    assert isinstance(failed, Failed)
    assert (failed.error.status, "finite" in failed.error.message) == (500, True)


def test_a_rollouts_step_has_the_version_of_its_own_forwards_or_none_where_they_differ(
    tiny_model: Callable[[str], Model],
) -> None:
    """Qwen-Image calls its transformer twice for a guided step, and weights may change in between."""
    model = tiny_model("qwenimage")
    stage, forwards = Stage(model), list[str]()
    model.pipeline.transformer.register_forward_hook(lambda *_: forwards.append(model.weight_version))
    guided = {"true_cfg_scale": 3.0, "negative_prompt": "a blue square", "width": 32, "height": 32}
    stage.jobs.submit(generate("spanning", rollout=Rollout(), **guided))
    while len(forwards) < 3:
        stage.batcher.step()
    model.weight_version = "new"
    stage.jobs.set_version("new")
    (result,) = stage.settle()
    stage.jobs.close()
    assert isinstance(result, Result)
    assert forwards == ["0", "0", "0", "new", "new", "new"]
    rolled_out = result.outputs[0].rolled_out
    assert rolled_out is not None
    assert rolled_out.reply["step_weight_versions"] == ["0", None, "new"]
    assert result.weight_versions == ["0", "new"]
