"""Durations of forwards are known by component and size, even if most of them are merged."""

from __future__ import annotations

import time

import pytest
import torch

from safelight.worker.forward.costs import Costs
from safelight.worker.forward.stopwatch import Stopwatch


def test_a_forward_of_one_call_is_worth_more_than_one_of_several() -> None:
    costs = Costs()
    costs.add("transformer", 100, 0.5, alone=False)
    assert [one.seconds for one in costs.measured()["transformer"]] == [0.5]
    costs.add("transformer", 100, 0.1, alone=True)
    costs.add("transformer", 100, 0.5, alone=False)
    assert [one.seconds for one in costs.measured()["transformer"]] == [0.1]


def test_a_forward_that_fails_or_has_no_size_is_not_measured() -> None:
    costs, stopwatch = Costs(), Stopwatch(torch.device("cpu"))
    seen: list[float] = []
    with pytest.raises(ValueError, match="no"), stopwatch.timed(seen.append):
        raise ValueError("no")
    assert seen == []
    with stopwatch.timed(seen.append):
        time.sleep(0.01)
    assert seen[0] >= 0.01
    costs.add("transformer", 0, 1.0, alone=True)
    costs.add("text_encoder", 100, 1.0, alone=True)
    assert costs.measured() == {}


def test_sizes_are_bounded_and_the_largest_are_kept() -> None:
    costs = Costs()
    for pixels in range(1, 101):
        costs.add("vae.decode", pixels, 1.0, alone=True)
    assert [one.pixels for one in costs.measured()["vae.decode"]] == list(range(69, 101))
