"""Weights that give their memory back while nothing is generated: on a GPU to the host, on a CPU to a file.

A parked module is whole: its tensors are elsewhere, and everything that reads and writes weights finds them there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

_ALIGNMENT = 64
"""Where a tensor begins within so many bytes decides the last bits of some CPU kernels, so it is kept."""


class Parking:
    """The weights of ``modules``, which are at home or parked. ``device`` is where they are at home."""

    def __init__(self, modules: list[nn.Module], device: torch.device) -> None:
        self._modules = modules
        self._device = device
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._offsets: dict[int, int] = {}

    @property
    def parked(self) -> bool:
        return bool(self._offsets)

    def park(self) -> None:
        """Raises ``OSError`` where there is no room for the file; every tensor is at home then."""
        if self.parked:
            return
        tensors = list(self._tensors())
        elsewhere = (
            [tensor.data.cpu() for tensor in tensors] if self._device.type == "cuda" else self._in_files(tensors)
        )
        for tensor, other in zip(tensors, elsewhere, strict=True):
            self._offsets[id(tensor)] = tensor.data_ptr() % _ALIGNMENT
            tensor.data = other
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def fetch(self) -> None:
        """Every byte is at home again."""
        for tensor in self._tensors():
            offset = self._offsets.pop(id(tensor), None)
            if offset is not None:
                tensor.data = self._at_home(tensor.data, offset)
        if self._files is not None:
            self._files.cleanup()
            self._files = None

    def _tensors(self) -> Iterator[torch.Tensor]:
        seen: set[int] = set()
        for module in self._modules:
            for tensor in (*module.parameters(), *module.buffers()):
                if id(tensor) not in seen and tensor.numel():
                    seen.add(id(tensor))
                    yield tensor

    def _in_files(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        self._files = tempfile.TemporaryDirectory(prefix="safelight-parked-", ignore_cleanup_errors=True)
        found = []
        for number, tensor in enumerate(tensors):
            file = Path(self._files.name, str(number))
            file.write_bytes(memoryview(tensor.data.contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
            mapped = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype)
            found.append(mapped.view(tensor.shape))
        return found

    def _at_home(self, parked: torch.Tensor, offset: int) -> torch.Tensor:
        if self._device.type == "cuda":
            return parked.to(self._device)
        raw = torch.empty(parked.nbytes + 2 * _ALIGNMENT, dtype=torch.uint8)
        start = (offset - raw.data_ptr()) % _ALIGNMENT
        home = raw[start : start + parked.nbytes].view(parked.dtype).view(parked.shape)
        return home.copy_(parked)
