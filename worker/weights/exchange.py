"""Writing new bytes where old ones are kept: a chunk at a time, on all cores, every tensor whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import torch

CHUNK = 1 << 19
"""Bytes that are exchanged at a time: so few that what was read is still in a core's cache when it is written."""

Read = Callable[[memoryview, int], object]
"""Fills memory with the bytes that are mapped at an address, without touching that."""

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of one shape: where to write, what, and where what was there is kept."""


class Exchange:
    """Exchanges tensors; a context. ``read`` gets bytes from where new tensors lie, where that is cheaper."""

    def __init__(self, read: Read | None = None) -> None:
        self._read = read
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads)

    @torch.no_grad()
    def __call__(self, pieces: Iterable[Triple]) -> None:
        """Copy the first of each to the third and the second to the first; all of them, or none."""
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            for local, new, before in pieces:
                if _plain(local, new, before):
                    self._bytes(_flat(local), _flat(new), _flat(before), kept)
                else:
                    for part in _chunks(local, new, before):
                        part[2].copy_(part[0])
                        kept.append((part[0], part[2]))
                        part[0].copy_(part[1])
        except BaseException:
            for there, before in kept:
                there.copy_(before)
            raise

    def _bytes(self, local: torch.Tensor, new: torch.Tensor, before: torch.Tensor, kept: list[Any]) -> None:
        """The same for bytes that lie in order, in threads that each take a part."""
        here, old, given = local.numpy(), before.numpy(), new.numpy()
        address = new.data_ptr()

        def exchange(start: int, end: int) -> None:
            for at in range(start, end, CHUNK):
                part = slice(at, min(at + CHUNK, end))
                old[part] = here[part]
                kept.append((local[part], before[part]))
                if self._read is None:
                    here[part] = given[part]
                else:
                    self._read(here[part].data, address + at)

        size = len(local)
        if size < 2 * CHUNK:
            exchange(0, size)
            return
        share = -(-size // (self._threads * CHUNK)) * CHUNK
        parts = [self._pool.submit(exchange, start, min(start + share, size)) for start in range(0, size, share)]
        errors = [error for part in parts if (error := part.exception()) is not None]
        if errors:
            raise errors[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


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
