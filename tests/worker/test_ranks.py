"""What ranks say to each other."""

from __future__ import annotations

import pytest
import torch

from safelight.tests.ranks import on_ranks
from safelight.tests.worker.summing import sums_round_once


@pytest.mark.parametrize("size", [2, 4])
def test_a_sum_in_low_precision_is_not_rounded_at_every_rank(size: int) -> None:
    on_ranks(size, sums_round_once, torch.bfloat16)
