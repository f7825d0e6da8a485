"""Moves weights out of the way while nothing is generated: from a GPU to the host, from a CPU to files.

An offloaded module is complete: its tensors are elsewhere, and whatever reads or writes weights finds them there.
"""

from __future__ import annotations

import errno
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from ....protocol.errors import Unavailable
from ...parallel.device import free_bytes
from ..checkpoint.copies import Copies
from ..checkpoint.pinned_copy import BUFFER_BYTES, Buffers
from ..progress import OnProgress
from .page_swap import ALIGNMENT, aligned_like, view_as
from .undo_log import in_file

_HOST = torch.device("cpu")


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
        """Offload all modules, or ``only`` these.

        Raises ``Unavailable`` where there is no room; nothing has moved then.
        """
        wanted = self._modules if only is None else only
        modules = [module for module in self._modules if module in wanted or module in self._offloaded_modules]
        tensors = [one for one in self._tensors(modules) if id(one) not in self._offsets]
        buffers = self._buffers("Sleeping") if tensors else None
        targets = self._allocate_away([tensor.data for tensor in tensors], on_progress)
        with Copies(None, on_progress, buffers) as copy:
            copy((target, tensor.data) for tensor, target in zip(tensors, targets, strict=True))
        for tensor, target in zip(tensors, targets, strict=True):
            self._offsets[id(tensor)] = tensor.data_ptr() % ALIGNMENT
            tensor.data = target
        self._offloaded_modules = modules
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def restore(self, on_progress: OnProgress, only: Sequence[nn.Module] | None = None) -> None:
        """Restore all modules, or ``only`` these; what two modules share comes with the first of them.

        Raises ``Unavailable`` where there is no room; nothing has moved then.
        """
        wanted = self._modules if only is None else only
        stay = [module for module in self._offloaded_modules if module not in wanted]
        own = {id(tensor) for tensor in self._tensors(wanted)}
        staying = {id(tensor) for tensor in self._tensors(stay)} - own
        offloaded = (tensor for tensor in self._tensors(self._modules) if id(tensor) in self._offsets)
        tensors = [tensor for tensor in offloaded if id(tensor) not in staying]
        buffers = self._buffers("Waking") if tensors else None
        targets = self._allocate_at_home(tensors)
        with Copies(None, on_progress, buffers) as copy:
            for tensor, target in zip(tensors, targets, strict=True):
                copy([(target, tensor.data)])
                tensor.data = target  # frees a file before the next is read, as files may be in memory too
                del self._offsets[id(tensor)]
        self._offloaded_modules = stay
        self._offsets = {key: offset for key, offset in self._offsets.items() if key in staying}  # forget freed tensors

    def _tensors(self, modules: Sequence[nn.Module]) -> Iterator[torch.Tensor]:
        """The tensors of ``modules``, each once, and the others where these are all modules."""
        weights = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
        others = self._others() if len(modules) == len(self._modules) else ()
        every = {id(tensor): tensor for tensor in (*weights, *others) if tensor.numel()}
        yield from every.values()

    def _buffers(self, what: str) -> Buffers | None:
        """The page-locked memory for copies between the host and a GPU."""
        if self._device.type != "cuda":
            return None
        try:
            return Buffers()
        except OSError as error:
            raise Unavailable(
                f"{what} needs {_mb(BUFFER_BYTES)} MB of page-locked host memory to copy through: {error}. "
                "Nothing has moved; free that memory and try again."
            ) from error

    def _allocate_away(self, tensors: Sequence[torch.Tensor], on_progress: OnProgress) -> list[torch.Tensor]:
        folder = Path(tempfile.gettempdir())
        if self._device.type == "cuda":
            free, where = free_bytes(_HOST), "host memory"
        else:
            free, where = shutil.disk_usage(folder).free, str(folder)
        needed, targets = sum(tensor.nbytes for tensor in tensors), []
        try:
            if needed > free:  # host memory would be given, and using it would end a process
                raise OSError(errno.ENOSPC, "less is free than needed")
            for tensor in tensors:
                targets.append(self._memory_away(tensor, folder))
                on_progress()
        except OSError as error:
            raise _no_room("Sleeping", needed, free, where) from error
        return targets

    def _memory_away(self, tensor: torch.Tensor, folder: Path) -> torch.Tensor:
        if self._device.type == "cuda":
            return aligned_like(tensor, 0)
        return view_as(in_file(folder, tensor.nbytes), tensor)

    def _allocate_at_home(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All at once, so that a GPU without memory is found before anything moves."""
        targets: list[torch.Tensor] = []
        try:
            targets.extend(self._memory_at_home(tensor) for tensor in tensors)
        except (OSError, MemoryError, torch.OutOfMemoryError) as error:
            targets.clear()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            needed = sum(tensor.nbytes for tensor in tensors)
            where = str(self._device) if self._device.type == "cuda" else "host memory"
            raise _no_room("Waking", needed, free_bytes(self._device), where) from error
        return targets

    def _memory_at_home(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            return torch.empty_like(tensor.data, device=self._device)
        return aligned_like(tensor.data, self._offsets[id(tensor)])


def _no_room(what: str, needed: int, free: float, where: str) -> Unavailable:
    missing = max(1, needed - free)  # with less than nothing missing, the free memory is in pieces
    return Unavailable(
        f"{what} needs {_mb(needed)} MB of {where}, and {_mb(free)} MB are free: {_mb(missing)} MB are missing. "
        "Nothing has moved; free that memory and try again."
    )


def _mb(size: float) -> int:
    return math.ceil(size / 1_000_000)
