"""The step cache: which steps it skips, whose, and that nothing else changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from safelight.protocol.forward_options import ForwardOptions
from safelight.protocol.rollouts import Rollout
from safelight.worker.caching.caching import Caching
from safelight.worker.caching.step_cache import CacheCounts, StepCache
from safelight.worker.crossing.call import Call
from safelight.worker.crossing.chain import Chain
from safelight.worker.crossing.coroutine import Coroutine
from safelight.worker.forward.batcher import Batcher
from safelight.worker.model.model import Model
from safelight.worker.requests.sample import SampleRun

from ..test_pipelines import plain, request
from .drawing import difference, draw


class Denoiser(nn.Module):
    """Answers latents with half of them, and writes down each call's prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[float] = []

    def forward(self, x: torch.Tensor, prompt: torch.Tensor, layers: tuple[int, ...] | None = None) -> torch.Tensor:
        self.calls.append(float(prompt[0]))
        return x / 2


class Denoising:
    """A pipeline's loop with a step cache."""

    def __init__(self, threshold: float, **options: Any) -> None:
        self.counts = CacheCounts()
        self.cache = StepCache(threshold, options.pop("rule", "easycache"), self.counts, **options)
        self.denoiser = Denoiser()
        self._chain = Chain([self.cache])
        self._x = torch.ones(1, 8)

    def run(
        self, steps: int, *, change: float = 0.01, prompts: tuple[float, ...] = (1.0,), observed: bool = True
    ) -> str:
        """Take ``steps``, each changing the latents by the share ``change``; returns each one's computed calls."""
        computed = ""
        for number in range(1, steps + 1):
            before = len(self.denoiser.calls)
            for prompt in prompts:
                self.ask(prompt)
            self._x = self._x * (1 - change)
            computed += str(len(self.denoiser.calls) - before)
            if observed:
                self.cache.stepped(number, steps)
        return computed

    def ask(self, prompt: float, **kwargs: Any) -> torch.Tensor:
        given = {"prompt": torch.tensor([prompt]), **kwargs}
        found: torch.Tensor = self._chain(Call("transformer", "__call__", self.denoiser, (self._x,), given))
        return found


def test_a_step_is_computed_when_the_estimated_changes_reach_the_threshold() -> None:
    """The answer changes by a hundredth a step, as the latents do, so three steps add up to less than 0.035."""
    denoising = Denoising(0.035)
    assert denoising.run(20) == "11100010001000100011"
    assert denoising.cache.skipped == denoising.counts.skipped == 12


def test_the_first_and_the_last_steps_are_always_computed() -> None:
    assert Denoising(1.0).run(28) == "11111" + "0" * 22 + "1"
    assert Denoising(1.0).run(4) == "1101"
    assert Denoising(1.0).run(2) == "11"


def test_both_calls_of_guidance_are_skipped_in_the_same_steps() -> None:
    denoising = Denoising(0.035)
    assert denoising.run(20, prompts=(1.0, 2.0)) == "22200020002000200022"
    assert denoising.denoiser.calls == [1.0, 2.0] * 8


@pytest.mark.parametrize("rule", ["easycache", "teacache"])
def test_a_sample_that_changes_fast_is_computed_throughout(rule: str) -> None:
    assert Denoising(0.05, rule=rule).run(12, change=0.2) == "1" * 12


def test_without_the_scheduler_s_steps_every_call_is_computed() -> None:
    assert Denoising(1.0).run(20, observed=False) == "1" * 20


def test_a_call_whose_answer_is_differentiated_is_computed() -> None:
    with torch.enable_grad():
        assert Denoising(1.0).run(20) == "1" * 20


def test_values_that_are_not_numbers_are_computed() -> None:
    denoising = Denoising(1.0)
    assert denoising.run(10, change=float("nan")) == "1" * 10


def test_a_call_of_another_form_is_computed() -> None:
    denoising = Denoising(1.0)
    denoising.run(6)
    denoising.cache.stepped(10, 28)
    before = len(denoising.denoiser.calls)
    denoising.ask(1.0, layers=(1, 2))
    denoising.cache.stepped(11, 28)
    denoising.ask(1.0, layers=(1, 2))
    denoising.cache.stepped(12, 28)
    denoising.ask(1.0, layers=(1, 3))
    assert len(denoising.denoiser.calls) - before == 3, "a rate takes two computed answers"


def test_a_pipeline_may_write_to_an_answer_that_is_used_again() -> None:
    denoising = Denoising(1.0)
    denoising.run(5)
    for number in (6, 7):
        denoising.cache.stepped(number, 28)
        answer = denoising.ask(1.0)
        assert torch.equal(answer, answer[:1, :1].expand_as(answer))
        assert float(answer[0, 0]) == pytest.approx(0.5 * 0.99**4)
        answer.zero_()


def test_every_rank_takes_one_rank_s_estimate() -> None:
    shared = list[float]()

    def agreed(number: float) -> float:
        shared.append(number)
        return 1.0

    assert Denoising(0.5, agreed=agreed).run(10) == "1" * 10
    assert len(shared) == 7, "one exchange for each step that may be skipped"


FAST = {"num_inference_steps": 12, "cache": 1.0}


@pytest.mark.parametrize("name", ["flux", "wan", "zimage"])
def test_requests_with_and_without_a_cache_share_forwards(name: str, tiny_model: Callable[[str], Model]) -> None:
    model, caching = tiny_model(name), Caching(ForwardOptions(step_cache_rule="teacache"), {})
    rows = list[int]()
    handle = model.pipeline.transformer.register_forward_hook(
        lambda _, args, kwargs, __: rows.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    asked = [request(name, index, **FAST) for index in (0, 1)] + [request(name, 2, num_inference_steps=12)]
    samples, _ = draw(model, caching, asked)
    handle.remove()
    assert difference(samples[2], plain(model, asked[2])) <= 1e-4, "the one without a cache"
    assert all(sample.savings.skipped > 0 for sample in samples[:2])
    assert samples[2].savings.skipped == 0
    assert caching.counts()["skipped_forwards"] == sum(sample.savings.skipped for sample in samples)
    assert len(set(rows)) > 1, "a forward has only the rows that must be computed"


@pytest.mark.parametrize("cache", ["off", 0])
def test_a_threshold_of_0_is_exact_even_if_the_server_caches(
    cache: str | float, tiny_model: Callable[[str], Model]
) -> None:
    model, caching = tiny_model("flux"), Caching(ForwardOptions(step_cache="fast"), {})
    asked = request("flux", 0, num_inference_steps=12, cache=cache)
    (sample,), _ = draw(model, caching, [asked])
    assert torch.equal(sample.coroutine.result, plain(model, asked))
    assert sample.savings.skipped == 0


def test_deterministic_requests_and_rollouts_are_never_cached(tiny_model: Callable[[str], Model]) -> None:
    model, caching = tiny_model("flux"), Caching(ForwardOptions(step_cache="1"), {})
    deterministic = request("flux", 0, num_inference_steps=12, deterministic=True)
    (sample,), _ = draw(model, caching, [deterministic])
    assert torch.equal(sample.coroutine.result, plain(model, deterministic))
    draw(model, caching, [request("flux", 0, num_inference_steps=12, rollout=Rollout())])
    assert caching.counts() == {"predicted_calls": 0, "missed_predictions": 0, "skipped_forwards": 0}
    (cached,), _ = draw(model, caching, [request("flux", 0, num_inference_steps=12)])
    assert cached.savings.skipped > 0, "others are, by the server's default"


def test_new_weights_are_used_from_the_next_step_on(tiny_model: Callable[[str], Model]) -> None:
    model, caching = tiny_model("flux"), Caching(ForwardOptions(), {})
    counts, steps = list[int](), itertools.count()

    def forget(runs: list[SampleRun]) -> None:
        counts.append(runs[0].savings.skipped)
        if next(steps) == 7:
            runs[0].savings.forget()

    asked = request("flux", 0, num_inference_steps=20, cache=1.0)
    (sample,), batcher = draw(model, caching, [asked], forget)
    (other,), undisturbed = draw(model, caching, [asked])
    assert 0 < sample.savings.skipped <= other.savings.skipped
    assert batcher.runner.counters.forwards >= undisturbed.runner.counters.forwards


def steps_in_turns(denoising: Denoising, between: Callable[[int], None]) -> list[int]:
    """Run forty steps on a batcher. Returns the skipped calls before each of its steps; ``between`` is called there."""
    batcher, skipped = Batcher(max_batch=1, max_tokens=100), list[int]()
    coroutine = Coroutine(lambda: denoising.run(40), lambda _: None)
    batcher.start(coroutine)
    while batcher.busy:
        skipped.append(denoising.cache.skipped)
        between(skipped[-1])
        batcher.step()
    assert coroutine.error is None
    return skipped


def test_skipped_steps_in_a_row_give_the_loop_back_to_cancels_and_messages() -> None:
    denoising = Denoising(1.0)
    skipped = steps_in_turns(denoising, lambda _: None)
    assert denoising.cache.skipped == 33
    assert max(after - before for before, after in itertools.pairwise(skipped)) == 1


def test_weights_that_change_between_two_skipped_steps_are_used_in_the_second() -> None:
    denoising, computed = Denoising(1.0), list[int]()

    def change(skipped: int) -> None:
        if skipped == 10 and not computed:
            denoising.cache.forget()
            computed.append(len(denoising.denoiser.calls))

    steps_in_turns(denoising, change)
    assert computed == [6]
    assert denoising.cache.skipped == 33 - 2, "a rate takes two computed answers"
    assert len(denoising.denoiser.calls) == 7 + 2
