"""Weights that give their memory back while nothing is generated: on a GPU to the host, on a CPU to files.

A parked module is whole: its tensors are elsewhere, and everything that reads and writes weights finds them there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from .pages import ALIGNMENT, home, laid_out
from .sign import Sign
from .undo import in_file


class Parking:
    """The weights of ``modules``, which are at home or parked. ``device`` is where they are at home.

    ``others`` gives what else is put away with them.
    """

    def __init__(
        self, modules: list[nn.Module], device: torch.device, others: Callable[[], Iterable[torch.Tensor]] = tuple
    ) -> None:
        self._modules = modules
        self._others = others
        self._device = device
        self._offsets: dict[int, int] = {}  # of what is parked, by the tensor's id

    @property
    def parked(self) -> bool:
        return bool(self._offsets)

    def park(self, sign: Sign) -> None:
        """Raises ``OSError`` where there is no room; every tensor is at home then."""
        if self.parked:
            return
        tensors = list(self._tensors())
        elsewhere = []
        for tensor in tensors:
            elsewhere.append(self._away(tensor.data))
            sign()
        for tensor, other in zip(tensors, elsewhere, strict=True):
            self._offsets[id(tensor)] = tensor.data_ptr() % ALIGNMENT
            tensor.data = other
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def fetch(self, sign: Sign) -> None:
        """Every byte is at home again. What is not, after an error, comes with the next call."""
        for tensor in self._tensors():
            if id(tensor) in self._offsets:
                tensor.data = self._home(tensor.data, self._offsets[id(tensor)])
                del self._offsets[id(tensor)]
                sign()
        self._offsets.clear()  # of what was let go of meanwhile

    def _tensors(self) -> Iterator[torch.Tensor]:
        weights = (tensor for module in self._modules for tensor in (*module.parameters(), *module.buffers()))
        every = {id(tensor): tensor for tensor in (*weights, *self._others()) if tensor.numel()}
        yield from every.values()

    def _away(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            return tensor.cpu()
        return laid_out(in_file(Path(tempfile.gettempdir()), tensor.nbytes), tensor).copy_(tensor)

    def _home(self, parked: torch.Tensor, offset: int) -> torch.Tensor:
        if self._device.type == "cuda":
            return parked.to(self._device)
        return home(parked, offset).copy_(parked)
