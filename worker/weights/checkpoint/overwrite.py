"""Copies new bytes beside the old ones, or over them while the old ones are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch

from ..progress import OnProgress

CHUNK = 1 << 19
"""Bytes that are overwritten at a time: few enough to stay in a core's cache between read and write."""

_READ = 8 << 20
"""Bytes that one thread reads at a time."""

Read = Callable[[memoryview, int], object]
"""Fills memory with the bytes that are mapped at an address, without a page fault there."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""Two tensors of one shape: the target, and the new values."""

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Three tensors of one shape: the target, the new values, and where the old values are kept."""


class StagedCopy:
    """Copies tensors on all cores, cast to the target's dtype. A context: all are copied when it ends.

    ``read``, where given, fetches the bytes of mapped tensors.
    """

    def __init__(self, read: Read | None, on_progress: OnProgress) -> None:
        self._read = read
        self._on_progress = on_progress
        self._pool = ThreadPoolExecutor(torch.get_num_threads())
        self._started: list[Future[object]] = []

    def __call__(self, pieces: Iterable[Pair]) -> None:
        """Begin to copy each pair. Errors of the copy are raised here or when the context ends."""
        for there, new in pieces:
            if self._read is not None and _plain(there, new):
                room, address = _flat(there).numpy().data, new.data_ptr()
                for at in range(0, len(room), _READ):
                    self._started.append(self._pool.submit(self._read, room[at : at + _READ], address + at))
            else:
                there.copy_(new)
                self._on_progress()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            for started in self._started if kind is None else ():
                started.result()
                self._on_progress()
        finally:
            self._pool.shutdown(cancel_futures=True)


@torch.no_grad()
def overwrite(pieces: Iterable[Triple], read: Read | None = None) -> None:
    """Keep the old values and write the new ones: all of them or, on an error, none."""
    kept: list[Pair] = []
    try:
        for local, new, before in pieces:
            for here, values, old in _chunks(local, new, before):
                old.copy_(here)
                kept.append((here, old))
                if read is not None and _plain(here, values):
                    read(_flat(here).numpy().data, values.data_ptr())
                else:
                    here.copy_(values)
    except BaseException:
        for there, before in kept:
            there.copy_(before)
        raise


def _plain(*tensors: torch.Tensor) -> bool:
    """True if the tensors are contiguous in host memory with one dtype, so that their bytes can be copied."""
    return len({tensor.dtype for tensor in tensors}) == 1 and all(
        type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" and tensor.is_contiguous()
        for tensor in tensors
    )


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _chunks(local: torch.Tensor, new: torch.Tensor, before: torch.Tensor) -> Iterator[Triple]:
    if local.device.type != "cpu" or local.nbytes <= CHUNK or not local.ndim:
        return iter([(local, new, before)])
    if all(tensor.is_contiguous() for tensor in (local, new, before)):
        local, new, before = local.view(-1), new.view(-1), before.view(-1)
    rows = max(1, CHUNK * len(local) // local.nbytes)
    return zip(*(torch.split(tensor, rows) for tensor in (local, new, before)), strict=True)
