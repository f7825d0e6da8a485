"""Weights that give their memory back while nothing is generated: on a GPU to the host, on a CPU to files.

A parked module is whole: its tensors are elsewhere, and everything that reads and writes weights finds them there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from ..progress import Sign
from .page_swap import ALIGNMENT, home, laid_out
from .undo_log import in_file


class Parking:
    """The weights of ``modules``, each of which is at home or parked. ``device`` is where they are at home.

    ``others`` gives what else is put away when all modules are, and is at home while any of them is.
    """

    def __init__(
        self, modules: list[nn.Module], device: torch.device, others: Callable[[], Iterable[torch.Tensor]] = tuple
    ) -> None:
        self._modules = modules
        self._others = others
        self._device = device
        self._away_now: list[nn.Module] = []
        self._offsets: dict[int, int] = {}  # of what is parked, by the tensor's id

    @property
    def parked(self) -> bool:
        return bool(self._offsets)

    def park(self, sign: Sign, only: Sequence[nn.Module] | None = None) -> None:
        """Put the modules away, ``only`` these if given. Raises ``OSError`` where there is no room; what was at home
        still is."""
        wanted = self._modules if only is None else only
        away = [module for module in self._modules if module in wanted or module in self._away_now]
        tensors = [one for one in self._tensors(away) if id(one) not in self._offsets]
        elsewhere = []
        for tensor in tensors:
            elsewhere.append(self._away(tensor.data))
            sign()
        for tensor, other in zip(tensors, elsewhere, strict=True):
            self._offsets[id(tensor)] = tensor.data_ptr() % ALIGNMENT
            tensor.data = other
        self._away_now = away
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def fetch(self, sign: Sign, only: Sequence[nn.Module] | None = None) -> None:
        """Every byte of the modules is at home again, or of ``only`` these. What is not, after an error, comes with the
        next call. What two modules have in common comes with the first of them."""
        wanted = self._modules if only is None else only
        stay = [module for module in self._away_now if module not in wanted]
        own = {id(tensor) for tensor in self._tensors(wanted)}
        staying = {id(tensor) for tensor in self._tensors(stay)} - own
        for tensor in self._tensors(self._modules):
            if id(tensor) in self._offsets and id(tensor) not in staying:
                tensor.data = self._home(tensor.data, self._offsets[id(tensor)])
                del self._offsets[id(tensor)]
                sign()
        self._away_now = stay
        self._offsets = {key: offset for key, offset in self._offsets.items() if key in staying}  # not what was let go

    def _tensors(self, modules: Sequence[nn.Module]) -> Iterator[torch.Tensor]:
        """Those of ``modules``, and of all of them the others too."""
        weights = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
        others = self._others() if len(modules) == len(self._modules) else ()
        every = {id(tensor): tensor for tensor in (*weights, *others) if tensor.numel()}
        yield from every.values()

    def _away(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            return tensor.cpu()
        return laid_out(in_file(Path(tempfile.gettempdir()), tensor.nbytes), tensor).copy_(tensor)

    def _home(self, parked: torch.Tensor, offset: int) -> torch.Tensor:
        if self._device.type == "cuda":
            return parked.to(self._device)
        return home(parked, offset).copy_(parked)
