"""A rank's device."""

from __future__ import annotations

import errno
import math
from pathlib import Path

import torch

from ...protocol.config import Config
from ...protocol.errors import StartFailed
from ..internals.torch import is_in_bad_fork


def find_device(config: Config, replica: int = 0, rank: int = 0) -> torch.device:
    """The rank's device: ranks take the GPUs in order, those of one replica each their own. Raises ``StartFailed``."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise StartFailed("--device cuda was given, but torch finds no CUDA device; use --device cpu or auto.")
    if not available or config.device == "cpu":
        return torch.device("cpu")
    if is_in_bad_fork():
        raise StartFailed("CUDA was opened before this worker was forked, and cannot be used in it; add --no-nursery.")
    ranks, gpus = config.replica_ranks, torch.cuda.device_count()
    if config.world_size > gpus:
        replicas = "1 replica" if config.replicas == 1 else f"{config.replicas} replicas"
        each = "1 rank" if ranks == 1 else f"{ranks} ranks"
        raise StartFailed(
            f"{replicas} of {each} need a GPU for each rank, {config.world_size} in all, and there are {gpus}; "
            f"start fewer, or make more GPUs visible (CUDA_VISIBLE_DEVICES)."
        )
    return torch.device("cuda", replica * ranks + rank)


def use_device(device: torch.device) -> None:
    """Make ``device`` the calling thread's current one, as kernels that are not torch operators run only there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


_MEMINFO = Path("/proc/meminfo")


def free_bytes(device: torch.device) -> float:
    """Free bytes on the GPU or in this machine's memory; infinite if the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not _MEMINFO.exists():
        return math.inf
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def pinned(size: int) -> torch.Tensor:
    """``size`` bytes of page-locked memory. Raises ``OSError`` where the system has none."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        raise OSError(errno.ENOMEM, f"page-locked memory cannot be had: {str(error).partition(chr(10))[0]}") from error
