"""Moves weights out of the way while nothing is generated: from a GPU to the host, from a CPU to files.

An offloaded module is complete: its tensors are elsewhere, and whatever reads or writes weights finds them there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from ..progress import OnProgress
from .page_swap import ALIGNMENT, aligned_like, view_as
from .undo_log import in_file


class Offloader:
    """Offloads and restores the weights of ``modules``, which belong on ``device``.

    ``others`` yields tensors that are offloaded when all modules are, and restored with the first of them.
    """

    def __init__(
        self, modules: list[nn.Module], device: torch.device, others: Callable[[], Iterable[torch.Tensor]] = tuple
    ) -> None:
        self._modules = modules
        self._others = others
        self._device = device
        self._offloaded_modules: list[nn.Module] = []
        self._offsets: dict[int, int] = {}  # address modulo ALIGNMENT before, by the id of the offloaded tensor

    @property
    def offloaded(self) -> bool:
        return bool(self._offsets)

    def offload(self, on_progress: OnProgress, only: Sequence[nn.Module] | None = None) -> None:
        """Offload all modules, or ``only`` these. Raises ``OSError`` where there is no room; nothing has moved then."""
        wanted = self._modules if only is None else only
        modules = [module for module in self._modules if module in wanted or module in self._offloaded_modules]
        tensors = [one for one in self._tensors(modules) if id(one) not in self._offsets]
        copies = []
        for tensor in tensors:
            copies.append(self._offloaded_copy(tensor.data))
            on_progress()
        for tensor, copy in zip(tensors, copies, strict=True):
            self._offsets[id(tensor)] = tensor.data_ptr() % ALIGNMENT
            tensor.data = copy
        self._offloaded_modules = modules
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def restore(self, on_progress: OnProgress, only: Sequence[nn.Module] | None = None) -> None:
        """Restore all modules, or ``only`` these; what two modules share comes with the first of them.

        After an error, the next call restores the rest.
        """
        wanted = self._modules if only is None else only
        stay = [module for module in self._offloaded_modules if module not in wanted]
        own = {id(tensor) for tensor in self._tensors(wanted)}
        staying = {id(tensor) for tensor in self._tensors(stay)} - own
        for tensor in self._tensors(self._modules):
            if id(tensor) in self._offsets and id(tensor) not in staying:
                tensor.data = self._restored_copy(tensor.data, self._offsets[id(tensor)])
                del self._offsets[id(tensor)]
                on_progress()
        self._offloaded_modules = stay
        self._offsets = {key: offset for key, offset in self._offsets.items() if key in staying}  # forget freed tensors

    def _tensors(self, modules: Sequence[nn.Module]) -> Iterator[torch.Tensor]:
        """The tensors of ``modules``, each once, and the others where these are all modules."""
        weights = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
        others = self._others() if len(modules) == len(self._modules) else ()
        every = {id(tensor): tensor for tensor in (*weights, *others) if tensor.numel()}
        yield from every.values()

    def _offloaded_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            return tensor.cpu()
        return view_as(in_file(Path(tempfile.gettempdir()), tensor.nbytes), tensor).copy_(tensor)

    def _restored_copy(self, tensor: torch.Tensor, offset: int) -> torch.Tensor:
        if self._device.type == "cuda":
            return tensor.to(self._device)
        return aligned_like(tensor, offset).copy_(tensor)
