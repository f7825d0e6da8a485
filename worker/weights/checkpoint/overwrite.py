"""Getting new bytes beside the old ones, or in their place with the old ones kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch

from ..progress import Sign

CHUNK = 1 << 19
"""Bytes that are exchanged at a time: so few that what was read is still in a core's cache when it is written."""

_READ = 8 << 20
"""Bytes that a thread reads at a time."""

Read = Callable[[memoryview, int], object]
"""Fills memory with the bytes that are mapped at an address, without touching that."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""Of one shape: where to write, and what."""

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of one shape: where to write, what, and where what was there is kept."""


class Staging:
    """Copies tensors on all cores, cast where they have another dtype; a context, and when it ends all are copied.

    ``read`` gets bytes from where new tensors lie, where that is cheaper.
    """

    def __init__(self, read: Read | None, sign: Sign) -> None:
        self._read = read
        self._sign = sign
        self._pool = ThreadPoolExecutor(torch.get_num_threads())
        self._started: list[Future[object]] = []

    def __call__(self, pieces: Iterable[Pair]) -> None:
        """Begin to copy the second of each to the first. Raises what the copy raises, or leaving the context does."""
        for there, new in pieces:
            if self._read is not None and _plain(there, new):
                room, address = _flat(there).numpy().data, new.data_ptr()
                for at in range(0, len(room), _READ):
                    self._started.append(self._pool.submit(self._read, room[at : at + _READ], address + at))
            else:
                there.copy_(new)
                self._sign()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            for started in self._started if kind is None else ():
                started.result()
                self._sign()
        finally:
            self._pool.shutdown(cancel_futures=True)


@torch.no_grad()
def exchange(pieces: Iterable[Triple], read: Read | None = None) -> None:
    """Copy the first of each to the third and the second to the first; all of them, or none."""
    kept: list[Pair] = []
    try:
        for local, new, before in pieces:
            for here, given, old in _chunks(local, new, before):
                old.copy_(here)
                kept.append((here, old))
                if read is not None and _plain(here, given):
                    read(_flat(here).numpy().data, given.data_ptr())
                else:
                    here.copy_(given)
    except BaseException:
        for there, before in kept:
            there.copy_(before)
        raise


def _plain(*tensors: torch.Tensor) -> bool:
    """Whether these are bytes in order, in the host's memory, to be copied as they are."""
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
