"""In fp32 an adapter that is merged, computed beside the weights, or named by a request is what peft makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from safelight.tests.ranks import on_ranks
from safelight.tests.worker.lora import agreement
from safelight.worker.parallel.ranks import ALONE


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("agreement")
    agreement.references(found)
    return found


def test_one_rank_draws_what_peft_draws(directory: Path) -> None:
    agreement.every_way(ALONE, directory, False)


@pytest.mark.parametrize("fused", [False, True])
def test_two_ranks_draw_what_peft_draws(fused: bool, directory: Path) -> None:
    on_ranks(2, agreement.every_way, directory, fused)


def test_in_bfloat16_an_adapter_is_as_near_to_fp32_as_peft_s(directory: Path) -> None:
    agreement.in_low_precision(directory, "wan")  # whose noise is fp32's
