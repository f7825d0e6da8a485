"""Whether both sides of a comparison fit into memory at once."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from ..weights.checkpoint.files import WeightFiles

_RESERVE = 0.8
"""The share of the free memory that weights may take; the rest is for activations."""

_MEMINFO = Path("/proc/meminfo")


def numbers(folder: Path) -> int:
    """How many numbers the component in ``folder`` has, by the headers of its files."""
    with WeightFiles(folder) as files:
        return sum(math.prod(files[name].get_shape()) for name in files)


def bytes_together(folder: Path, dtype: torch.dtype) -> int:
    """Of the runtime's component and, in fp32, one reference; in lower precision there are a plain one and fp64's."""
    sides = 2 * dtype.itemsize + (0 if dtype is torch.float32 else torch.float64.itemsize)
    return numbers(folder) * sides


def fit_together(folder: Path, dtype: torch.dtype, device: torch.device) -> bool:
    return fits(bytes_together(folder, dtype), device)


def fits(weights: int, device: torch.device) -> bool:
    """Whether so many bytes of weights leave room for their activations."""
    return weights <= _RESERVE * free(device)


def free(device: torch.device) -> float:
    """Free bytes of the device, or of this machine; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not _MEMINFO.exists():
        return math.inf
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
