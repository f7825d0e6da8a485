"""Copies of tensors' bytes: beside the old ones, or over them while the old ones are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch

from ..progress import OnProgress
from .pinned_copy import Buffers, PinnedCopy

CHUNK = 1 << 19
"""Bytes that are overwritten at a time: few enough to stay in a core's cache between read and write."""

_READ = 8 << 20
"""Bytes that one thread reads at a time."""

_READ_TO_PIN = 1 << 20
"""Bytes that one thread reads at a time into page-locked memory, where the others wait for it."""

Read = Callable[[memoryview, int], object]
"""Fills memory with the bytes that are mapped at an address, without a page fault there."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""Two tensors of one shape: the target, and the new values."""

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Three tensors of one shape: the target, the new values, and where the old values are kept."""


class Copies:
    """Copies tensors on all cores, cast to the target's dtype. A context: all are copied when it ends.

    ``read``, where given, fetches the bytes of mapped tensors. Between host memory and a GPU, bytes pass through
    page-locked ``buffers``, which only copies in one of both memories do without.
    """

    def __init__(self, read: Read | None, on_progress: OnProgress, buffers: Buffers | None = None) -> None:
        self._read = read
        self._buffers = buffers
        self._on_progress = on_progress
        self._pool = ThreadPoolExecutor(torch.get_num_threads())
        self._started: list[Future[object]] = []
        self._over_bus: PinnedCopy | None = None

    def __call__(self, pieces: Iterable[Pair]) -> None:
        """Begin to copy each pair. Errors of the copy are raised here or when the context ends."""
        for there, new in pieces:
            if self._read is not None and _plain(there, new):
                self._started += (self._pool.submit(self._read, *part) for part in _parts(there, new, _READ))
                continue
            if there.device.type == new.device.type:
                there.copy_(new)
            elif new.device.type == "cpu":
                self._bus(there.device).upload(there, new)
            else:
                self._bus(new.device).download(there, new)
            self._on_progress()

    @torch.no_grad()
    def overwrite(self, pieces: Iterable[Triple]) -> None:
        """Keep the old values and write the new ones: all of them or, on an error, none."""
        kept: list[Pair] = []
        try:
            for local, new, before in pieces:
                if local.device.type == "cuda":
                    bus = self._bus(local.device)
                    bus.download(before, local)
                    kept.append((local, before))  # now that every byte of it is on its way
                    bus.overwrite(local, new)
                else:
                    self._overwrite_on_host(local, new, before, kept)
        except BaseException:
            if self._over_bus is not None:
                self._over_bus.settle()
            for there, before in kept:
                there.copy_(before)
            raise

    def _overwrite_on_host(
        self, local: torch.Tensor, new: torch.Tensor, before: torch.Tensor, kept: list[Pair]
    ) -> None:
        for here, values, old in _chunks(local, new, before):
            old.copy_(here)
            kept.append((here, old))
            if self._read is not None and _plain(here, values):
                self._read(_flat(here).numpy().data, values.data_ptr())
            else:
                here.copy_(values)

    def _bus(self, device: torch.device) -> PinnedCopy:
        if self._over_bus is None:
            assert self._buffers is not None, "taken before the first copy, which must not fail for lack of them"
            self._over_bus = PinnedCopy(device, self._fill, self._buffers)
        return self._over_bus

    def _fill(self, buffer: torch.Tensor, values: torch.Tensor) -> None:
        """Copy ``values`` into ``buffer``, on all cores, and wait for that."""
        if self._read is not None and _plain(buffer, values):
            for _ in self._pool.map(self._read, *zip(*_parts(buffer, values, _READ_TO_PIN), strict=True)):
                pass  # an error is raised here
        else:
            buffer.copy_(values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            for started in self._started if kind is None else ():
                started.result()
                self._on_progress()
        finally:
            self._pool.shutdown(cancel_futures=True)
            if self._over_bus is not None:
                self._over_bus.settle()  # also after an error: what was kept must be there to be put back


def _plain(*tensors: torch.Tensor) -> bool:
    """True if the tensors are contiguous in host memory with one dtype, so that their bytes can be copied."""
    return len({tensor.dtype for tensor in tensors}) == 1 and all(
        type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" and tensor.is_contiguous()
        for tensor in tensors
    )


def _parts(there: torch.Tensor, new: torch.Tensor, size: int) -> Iterator[tuple[memoryview, int]]:
    """``there`` in parts of ``size`` bytes, each with the address of the new ones."""
    target, address = _flat(there).numpy().data, new.data_ptr()
    return ((target[at : at + size], address + at) for at in range(0, len(target), size))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _chunks(local: torch.Tensor, new: torch.Tensor, before: torch.Tensor) -> Iterator[Triple]:
    if local.nbytes <= CHUNK or not local.ndim:
        return iter([(local, new, before)])
    if all(tensor.is_contiguous() for tensor in (local, new, before)):
        local, new, before = local.view(-1), new.view(-1), before.view(-1)
    rows = max(1, CHUNK * len(local) // local.nbytes)
    return zip(*(torch.split(tensor, rows) for tensor in (local, new, before)), strict=True)
