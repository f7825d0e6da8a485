"""Each rank has a GPU of its own, and the dtype that its GPU multiplies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safelight.protocol.config import Config
from safelight.protocol.errors import StartFailed
from safelight.worker.model.dtype import choose_dtype
from safelight.worker.parallel import device as devices
from safelight.worker.parallel.device import find_device


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(devices, "is_in_bad_fork", lambda: False)


def config(**options: Any) -> Config:
    return Config(device="cuda", **options)


def test_no_two_ranks_share_a_gpu(four_gpus: None) -> None:
    two = config(replicas=2, tp=2)
    assert [find_device(two, replica, rank).index for replica in (0, 1) for rank in (0, 1)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("replicas", "tp", "said"),
    [
        (3, 2, "3 replicas of 2 ranks need a GPU for each rank, 6 in all, and there are 4"),
        (1, 8, "1 replica of 8 ranks"),
    ],
)
def test_more_ranks_than_gpus_are_refused_at_the_start(four_gpus: None, replicas: int, tp: int, said: str) -> None:
    """Doubled up in silence, two models would not fit, and NCCL would find a duplicate GPU much later."""
    with pytest.raises(StartFailed, match=said):
        find_device(config(replicas=replicas, tp=tp), 0, 0)


@pytest.mark.parametrize(("has", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_that_only_emulates_bfloat16_gets_float16(
    has: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_supported(including_emulation: bool = True) -> bool:
        return has or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    chosen = choose_dtype(config(), torch.device("cuda", 0), lambda: "BF16")
    assert chosen is dtype
    assert choose_dtype(config(dtype="bfloat16"), torch.device("cuda", 0), lambda: None) is torch.bfloat16
