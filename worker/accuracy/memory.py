"""Estimates of the memory that both sides of a comparison need at once."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from ..parallel.device import free_bytes
from ..weights.checkpoint.files import WeightFiles

_RESERVE = 0.8
"""The share of free memory that weights may take; the rest is for activations."""


def numbers(folder: Path) -> int:
    """The number of elements of the component in ``folder``, read from its files' headers."""
    with WeightFiles(folder) as files:
        return sum(math.prod(files[name].get_shape()) for name in files)


def bytes_together(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of the runtime's component and the plain one; below fp32, also of the fp64 reference."""
    sides = 2 * dtype.itemsize + (0 if dtype is torch.float32 else torch.float64.itemsize)
    return numbers(folder) * sides


def fit_together(folder: Path, dtype: torch.dtype, device: torch.device) -> bool:
    return fits(bytes_together(folder, dtype), device)


def fits(weights: int, device: torch.device) -> bool:
    """True if ``weights`` bytes leave room for activations."""
    return weights <= _RESERVE * free_bytes(device)
