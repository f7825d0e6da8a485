"""A rank's device."""

from __future__ import annotations

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
    if ranks > gpus:
        raise StartFailed(f"A replica of {ranks} ranks needs a GPU for each, and there are {gpus}.")
    return torch.device("cuda", (replica * ranks + rank) % gpus)


def use_device(device: torch.device) -> None:
    """Make ``device`` the calling thread's current one, as kernels that are not torch operators run only there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
