"""Durations of forwards are known by component and size, even if most of them are merged."""

from __future__ import annotations

import time

import pytest
import torch

from safelight.worker.forward.costs import Costs


@pytest.fixture
def costs() -> Costs:
    return Costs(torch.device("cpu"))


def test_a_forward_of_one_call_is_worth_more_than_one_of_several(costs: Costs) -> None:
    with costs.timed("transformer", 100, alone=False):
        time.sleep(0.05)
    ((_, merged),) = [(one.pixels, one.seconds) for one in costs.measured()["transformer"]]
    with costs.timed("transformer", 100, alone=True):
        pass
    ((_, alone),) = [(one.pixels, one.seconds) for one in costs.measured()["transformer"]]
    with costs.timed("transformer", 100, alone=False):
        time.sleep(0.05)
    assert alone < merged
    assert costs.measured()["transformer"][0].seconds == alone


def test_what_fails_or_has_no_size_is_not_measured(costs: Costs) -> None:
    with pytest.raises(ValueError, match="no"), costs.timed("transformer", 100, alone=True):
        raise ValueError("no")
    with costs.timed("transformer", 0, alone=True), costs.timed("text_encoder", 100, alone=True):
        pass
    assert costs.measured() == {}


def test_sizes_are_bounded_and_the_largest_are_kept(costs: Costs) -> None:
    for pixels in range(1, 101):
        with costs.timed("vae.decode", pixels, alone=True):
            pass
    assert [one.pixels for one in costs.measured()["vae.decode"]] == list(range(69, 101))
