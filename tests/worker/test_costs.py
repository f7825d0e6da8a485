"""Durations of forwards are known by component and size, even if most of them are merged."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from safelight.protocol.costs import Measured
from safelight.worker.crossing.call import Call, cross_all
from safelight.worker.crossing.coroutine import Coroutine
from safelight.worker.forward import stopwatch
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.costs import Costs
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.forward.stopwatch import Stopwatch
from safelight.worker.forward.timing import Timing


def test_a_forward_of_one_output_is_worth_more_than_one_of_several() -> None:
    costs = Costs()
    costs.add("transformer", 100, 0.5, calls=0)
    assert [one.seconds for one in costs.measured()["transformer"]] == [0.5]
    costs.add("transformer", 100, 0.1, calls=1)
    costs.add("transformer", 100, 0.5, calls=0)
    assert [one.seconds for one in costs.measured()["transformer"]] == [0.1]


def test_calls_that_one_output_has_computed_together_are_what_its_forward_costs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guidance pairing computes both calls of a step as one, after a first step with one call at a time."""
    now = 0.0
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: now))

    def denoise(x: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += len(x)
        return x * 2

    def body() -> None:
        for calls in (1, 1, 2, 2, 2, 1):
            cross_all(*[Call("transformer", "__call__", denoise, (torch.ones(1, 4, 2),), {}) for _ in range(calls)])

    timing = Timing(torch.device("cpu"))
    batcher = Batcher(max_batch=4, max_tokens=10**6, resources=ForwardResources(timing=timing))
    coroutine = Coroutine(body, lambda _: None)
    coroutine.pixels = 100
    batcher.start(coroutine)
    while batcher.busy:
        batcher.step()
    assert timing.costs() == {"transformer": [Measured(100, 2.0)]}


def test_a_forward_that_fails_or_has_no_size_is_not_measured() -> None:
    costs, watch = Costs(), Stopwatch(torch.device("cpu"))
    seen: list[float] = []
    with pytest.raises(ValueError, match="no"), watch.timed(seen.append):
        raise ValueError("no")
    assert seen == []
    with watch.timed(seen.append):
        time.sleep(0.01)
    assert seen[0] >= 0.01
    costs.add("transformer", 0, 1.0, calls=1)
    costs.add("text_encoder", 100, 1.0, calls=1)
    assert costs.measured() == {}


def test_sizes_are_bounded_and_the_largest_are_kept() -> None:
    costs = Costs()
    for pixels in range(1, 101):
        costs.add("vae.decode", pixels, 1.0, calls=1)
    assert [one.pixels for one in costs.measured()["vae.decode"]] == list(range(69, 101))
