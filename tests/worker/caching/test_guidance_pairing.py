"""Guidance pairing: which calls become one forward, and that no answer ever depends on a prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from safelight.protocol.forward_options import ForwardOptions
from safelight.worker.caching.caching import Caching
from safelight.worker.caching.guidance_pairing import GuidancePairing, PairingCounts
from safelight.worker.caching.late_check import LateCheck, PredictionWrong
from safelight.worker.crossing.call import Call
from safelight.worker.crossing.chain import Chain
from safelight.worker.crossing.coroutine import Cancelled, Coroutine
from safelight.worker.forward.batcher import Batcher
from safelight.worker.model.model import Model

from ..test_pipelines import plain, request
from .drawing import difference, draw

Body = Callable[["Asking"], Any]
PROMPT, NEGATIVE = torch.full((1, 2), 10.0), torch.full((1, 2), 20.0)


class Denoiser(nn.Module):
    """Adds its arguments, and writes down the prompts of each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards: list[list[float]] = []

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor, state: Any = None) -> torch.Tensor:
        self.forwards.append([float(row[0]) for row in prompt])
        return x + timestep.reshape(-1, 1) + prompt


class Asking:
    """Calls of a pipeline's body through guidance pairing."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.counts = PairingCounts()
        self.unmergeable = dict[str, str]()
        self.pairing = GuidancePairing(self.counts, self.unmergeable)
        self._chain = Chain([self.pairing])
        self._denoiser = denoiser

    def __call__(self, x: torch.Tensor, timestep: float, prompt: torch.Tensor, **kwargs: Any) -> list[float]:
        given = {"timestep": torch.tensor([timestep]), "prompt": prompt, **kwargs}
        answer = self._chain(Call("transformer", "__call__", self._denoiser, (x,), given))
        found: list[float] = answer[0].tolist()
        return found


def run(body: Body, before: Callable[[Batcher, Coroutine], None] | None = None) -> tuple[Asking, Denoiser, Coroutine]:
    """Run ``body`` on a batcher; ``before`` is called before each of its steps."""
    denoiser = Denoiser()
    asking, batcher = Asking(denoiser), Batcher(max_batch=16, max_tokens=10**6)
    coroutine = Coroutine(lambda: body(asking), lambda _: None)
    batcher.start(coroutine)
    while batcher.busy:
        if before is not None:
            before(batcher, coroutine)
        batcher.step()
    if coroutine.error is not None and not isinstance(coroutine.error, Cancelled):
        raise coroutine.error
    return asking, denoiser, coroutine


def guided(ask: Asking, x: float, t: float, prompts: Sequence[torch.Tensor] = (PROMPT, NEGATIVE)) -> list[list[float]]:
    """A step: fresh latents and timesteps, the pipeline's own prompts."""
    latents = torch.full((1, 2), x)
    return [ask(latents, t, prompt) for prompt in prompts]


def test_the_two_calls_of_a_step_are_one_forward_from_the_second_step_on() -> None:
    asking, denoiser, ended = run(lambda ask: [guided(ask, x, 0.5) for x in (1.0, 2.0, 3.0)])
    assert denoiser.forwards == [[10.0], [20.0], [10.0, 20.0], [10.0, 20.0]]
    assert ended.result == [[[x + 10.5] * 2, [x + 20.5] * 2] for x in (1.0, 2.0, 3.0)]
    assert asking.counts == PairingCounts(predicted=2, missed=0)


def test_three_calls_of_a_step_are_one_forward() -> None:
    third = torch.full((1, 2), 30.0)
    _, denoiser, ended = run(lambda ask: [guided(ask, x, 0.5, (PROMPT, NEGATIVE, third)) for x in (1.0, 2.0)])
    assert denoiser.forwards == [[10.0], [20.0], [30.0], [10.0, 20.0, 30.0]]
    assert ended.result[1] == [[12.5] * 2, [22.5] * 2, [32.5] * 2]


def test_guidance_that_ends_midway_costs_one_call_and_begins_again_by_itself() -> None:
    def body(ask: Asking) -> list[Any]:
        one = (PROMPT,)
        return [guided(ask, float(step), 0.5, one if 2 <= step < 5 else (PROMPT, NEGATIVE)) for step in range(8)]

    asking, denoiser, ended = run(body)
    pair, single = [10.0, 20.0], [10.0]
    assert denoiser.forwards == [single, [20.0], pair, pair, single, single, single, [20.0], pair, pair]
    assert asking.counts == PairingCounts(predicted=4, missed=1)
    assert ended.result[2] == [[12.5, 12.5]]


def test_a_pipeline_that_changes_its_form_each_step_is_left_alone() -> None:
    def body(ask: Asking) -> None:
        for step in range(40):
            guided(ask, float(step), 0.5, (PROMPT, NEGATIVE) if step % 2 == 0 else (PROMPT,))

    asking, _, _ = run(body)
    assert asking.counts.missed <= 4


def test_one_call_a_step_is_never_made_with_another() -> None:
    asking, denoiser, _ = run(lambda ask: [guided(ask, x, 0.5, (PROMPT,)) for x in (1.0, 2.0, 3.0)])
    assert denoiser.forwards == [[10.0]] * 3
    assert asking.counts == PairingCounts()


@pytest.mark.parametrize("kind", ["another prompt", "written prompt", "written latents", "timestep", "settings"])
def test_a_call_that_is_not_as_predicted_is_computed(kind: str) -> None:
    def body(ask: Asking) -> list[float]:
        negative = NEGATIVE.clone()
        guided(ask, 1.0, 0.5, (PROMPT, negative))
        latents = torch.full((1, 2), 2.0)
        ask(latents, 0.5, PROMPT)
        match kind:
            case "another prompt":
                return ask(latents, 0.5, NEGATIVE + 1)
            case "written prompt":
                negative += 1
                return ask(latents, 0.5, negative)
            case "written latents":
                latents += 1
                return ask(latents, 0.5, negative)
            case "timestep":
                return ask(latents, 1.5, negative)
            case _:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    return ask(latents, 0.5, negative)

    asking, denoiser, ended = run(body)
    assert ended.result == [22.5 if kind == "settings" else 23.5] * 2
    assert asking.counts.predicted == 1
    assert len(denoiser.forwards) == 4, "the last call has a forward of its own"


def test_prompts_of_different_lengths_are_not_made_together() -> None:
    def body(ask: Asking) -> None:
        for x in (1.0, 2.0, 3.0):
            latents = torch.full((1, 2), x)
            ask(latents, 0.5, PROMPT)
            ask(latents, 0.5, torch.full((1, 1), 20.0))

    asking, denoiser, _ = run(body)
    assert denoiser.forwards == [[10.0], [20.0]] * 3
    assert asking.counts == PairingCounts()


def test_calls_with_an_object_that_may_keep_state_are_not_made_together() -> None:
    cache = object()

    def body(ask: Asking) -> None:
        for x in (1.0, 2.0, 3.0):
            latents = torch.full((1, 2), x)
            for prompt in (PROMPT, NEGATIVE):
                ask(latents, 0.5, prompt, state=cache)

    asking, denoiser, _ = run(body)
    assert denoiser.forwards == [[10.0], [20.0]] * 3
    assert asking.counts == PairingCounts()


def test_a_component_that_may_not_merge_is_not_predicted() -> None:
    def body(ask: Asking) -> None:
        ask.unmergeable["transformer"] = "merged, it changes the picture"
        for x in (1.0, 2.0):
            guided(ask, x, 0.5)

    asking, denoiser, _ = run(body)
    assert denoiser.forwards == [[10.0], [20.0]] * 2
    assert asking.counts == PairingCounts()


@pytest.mark.parametrize("steps", [3, 4])
def test_a_request_that_is_cancelled_at_a_pair_ends(steps: int) -> None:
    before = iter(range(100))

    def cancel(batcher: Batcher, coroutine: Coroutine) -> None:
        if next(before) == steps:
            batcher.cancel(coroutine)

    _, denoiser, ended = run(lambda ask: [guided(ask, float(x), 0.5) for x in range(9)], cancel)
    assert isinstance(ended.error, Cancelled)
    assert denoiser.forwards == [[10.0], [20.0], [10.0, 20.0], [10.0, 20.0]][:steps]


def test_a_value_that_a_gpu_finds_different_later_is_reported_before_the_result_is_used() -> None:
    late = LateCheck()
    late.expect_equal([(torch.ones(2), torch.ones(2))])
    late.expect_equal([(torch.ones(2), torch.ones(2)), (torch.ones(2), torch.tensor([1.0, 2.0]))])
    with pytest.raises(PredictionWrong):
        late.settle()
    late.settle()


@pytest.mark.parametrize("name", ["wan", "qwenimage", "lumina2", "chroma"])
def test_a_guided_request_is_within_1e_4_of_diffusers(name: str, tiny_model: Callable[[str], Model]) -> None:
    model, caching = tiny_model(name), Caching(ForwardOptions(), {})
    changes = {"negative_prompt": "a red circle"} if name == "qwenimage" else {}  # prompts of one length alone meet
    asked = request(name, 0, num_inference_steps=4, **changes)
    (sample,), batcher = draw(model, caching, [asked])
    assert difference(sample, plain(model, asked)) <= 1e-4
    assert caching.counts() == {"predicted_calls": 3, "missed_predictions": 0, "skipped_forwards": 0}
    assert batcher.runner.counters.calls - batcher.runner.counters.forwards == 3
    exact = request(name, 0, num_inference_steps=4, deterministic=True, **changes)
    (alone,), _ = draw(model, caching, [exact])
    assert torch.equal(alone.coroutine.result, plain(model, exact))
    assert caching.counts()["predicted_calls"] == 3


def test_sixteen_guided_requests_are_forwards_of_thirty_two_rows(tiny_model: Callable[[str], Model]) -> None:
    model, caching = tiny_model("wan"), Caching(ForwardOptions(), {})
    rows = list[int]()
    handle = model.pipeline.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    requests = [request("wan", index % 6, num_inference_steps=3) for index in range(16)]
    samples, _ = draw(model, caching, requests)
    handle.remove()
    assert rows == [16, 16, 32, 32]
    assert difference(samples[5], plain(model, requests[5])) <= 1e-4


def test_a_request_with_guidance_1_is_as_without_pairing(tiny_model: Callable[[str], Model]) -> None:
    model, caching = tiny_model("wan"), Caching(ForwardOptions(), {})
    asked = request("wan", 0, guidance_scale=1.0, num_inference_steps=3)
    (sample,), _ = draw(model, caching, [asked])
    assert torch.equal(sample.coroutine.result, plain(model, asked))
    assert caching.counts() == {"predicted_calls": 0, "missed_predictions": 0, "skipped_forwards": 0}


def test_a_sample_whose_prediction_was_wrong_begins_again(
    tiny_model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def settle(_: GuidancePairing) -> None:
        raise PredictionWrong

    model, caching = tiny_model("wan"), Caching(ForwardOptions(), {})
    monkeypatch.setattr(GuidancePairing, "settle", settle)
    asked = request("wan", 0, num_inference_steps=3)
    (sample,), _ = draw(model, caching, [asked])
    assert torch.equal(sample.coroutine.result, plain(model, asked))
    assert "begins again, without guidance pairing" in caplog.text
