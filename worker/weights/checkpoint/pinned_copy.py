"""Copies between host memory and a GPU at the rate of the bus, through page-locked buffers.

A GPU reaches ordinary host memory only through a small buffer of the driver, and the host waits for each tensor: a
third of the bus's rate or less. Here two page-locked halves take turns in each direction: while the GPU's copy engine
works on one, this thread fills or empties the other on all cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...parallel.device import pinned

HALF = 32 << 20
"""Bytes of a half: the copy engine needs about a millisecond for it."""

BUFFER_BYTES = 4 * HALF
"""Page-locked bytes for both directions."""

_MAX_PIECE = HALF // 2
_ALIGNMENT = 64

Fill = Callable[[torch.Tensor, torch.Tensor], object]
"""Copies values from host memory into a buffer of their shape, and returns when they are there."""


class Buffers:
    """Page-locked memory for one :class:`PinnedCopy` at a time. Raises ``OSError`` where there is none."""

    def __init__(self) -> None:
        self.up = pinned(HALF), pinned(HALF)
        self.down = pinned(HALF), pinned(HALF)


class PinnedCopy:
    """Begins copies in both directions on streams of its own; :meth:`settle` waits for the end of all of them.

    Until then a copy's device memory must stay allocated, and the caller must not write to its source on the device.
    """

    def __init__(self, device: torch.device, fill: Fill, buffers: Buffers) -> None:
        self._device = device
        self._fill = fill
        self._up = _Halves(device, buffers.up)
        self._down = _Halves(device, buffers.down)

    def upload(self, there: torch.Tensor, new: torch.Tensor) -> None:
        """Copy ``new`` from the host to ``there`` on the device, cast. Afterwards ``new`` is no longer needed."""
        # kernels launched before may still read ``there``, or the memory that the allocator made it of
        self._up.stream.wait_stream(torch.cuda.current_stream(self._device))
        for target, values in _pieces(there, new):
            buffer = self._up.buffer_for(target)
            self._fill(buffer, values)
            with torch.cuda.stream(self._up.stream):
                target.copy_(buffer, non_blocking=True)

    def download(self, there: torch.Tensor, old: torch.Tensor) -> None:
        """Copy ``old`` from the device to ``there`` on the host, which has it after :meth:`settle`."""
        self._down.stream.wait_stream(torch.cuda.current_stream(self._device))  # kernels may still write ``old``
        if there.is_contiguous() and old.is_contiguous() and there.dtype == old.dtype and there.is_pinned():
            with torch.cuda.stream(self._down.stream):
                there.copy_(old, non_blocking=True)
            return
        for target, values in _pieces(there, old):
            buffer = self._down.buffer_for(values)
            with torch.cuda.stream(self._down.stream):
                buffer.copy_(values, non_blocking=True)
            self._down.when_done(target, buffer)

    def overwrite(self, here: torch.Tensor, new: torch.Tensor) -> None:
        """Write ``new`` over ``here`` after the downloads that were begun; others may run at the same time."""
        if new.device.type == "cpu":
            self._up.stream.wait_stream(self._down.stream)  # no byte is overwritten before it is kept
            self.upload(here, new)
        else:
            torch.cuda.current_stream(self._device).wait_stream(self._down.stream)
            here.copy_(new)

    def settle(self) -> None:
        """Wait for all copies. Afterwards their tensors may be freed, and used on any stream."""
        self._up.settle()
        self._down.settle()


class _Halves:
    """Two page-locked halves that the copies of one stream use by turns.

    A half that is left gets an event behind its copies. The host touches the half again only after that event: before,
    the engine may still read bytes that an upload has put there, or write those that a download brings.
    """

    def __init__(self, device: torch.device, memory: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._memory = memory
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ends: list[torch.cuda.Event | None] = [None, None]
        self._arriving: tuple[list[tuple[torch.Tensor, torch.Tensor]], ...] = ([], [])
        self._current = 0
        self._used = 0

    def buffer_for(self, piece: torch.Tensor) -> torch.Tensor:
        """A buffer like ``piece``, contiguous, that no copy uses any more."""
        if self._used + piece.nbytes > HALF:
            self._turn()
        buffer = self._memory[self._current][self._used : self._used + piece.nbytes]
        self._used += -(-piece.nbytes // _ALIGNMENT) * _ALIGNMENT
        return buffer.view(piece.dtype).view(piece.shape)

    def when_done(self, target: torch.Tensor, buffer: torch.Tensor) -> None:
        """Copy ``buffer`` of the current half to ``target`` once the device has filled it."""
        self._arriving[self._current].append((target, buffer))

    def settle(self) -> None:
        for _ in self._ends:
            self._turn()

    def _turn(self) -> None:
        """Leave the current half, and wait for the copies of the other."""
        self._ends[self._current] = self.stream.record_event()
        self._current, self._used = 1 - self._current, 0
        if (end := self._ends[self._current]) is not None:
            end.synchronize()
        for target, buffer in self._arriving[self._current]:
            target.copy_(buffer)
        self._arriving[self._current].clear()


def _pieces(there: torch.Tensor, new: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both tensors in pieces that fit into a half."""
    if not there.numel():
        return
    if there.is_contiguous() and new.is_contiguous():
        there, new = there.view(-1), new.view(-1)
    largest = max(there.itemsize, new.itemsize) * there.numel()
    if largest <= _MAX_PIECE:
        yield there, new
    elif len(there) == 1:
        yield from _pieces(there[0], new[0])
    else:
        rows = max(1, _MAX_PIECE * len(there) // largest)
        for target, values in zip(torch.split(there, rows), torch.split(new, rows), strict=True):
            yield from _pieces(target, values)
