"""Streams a component's blocks through two buffers on the GPU: one computes while the next one is copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .host_copy import HostCopy


@dataclass(slots=True, eq=False)
class _Buffer:
    """``arrived`` follows the last copy to ``memory``, ``used`` the last forward of its ``block``."""

    memory: torch.Tensor
    block: int | None = None
    arrived: torch.cuda.Event | None = None
    used: torch.cuda.Event | None = None


class BlockStream:
    """Brings each of ``blocks`` to ``device`` before its forward, and begins the copy of the one that follows.

    Blocks follow each other as they last did; at first, in the order in which they are given.
    """

    def __init__(self, blocks: Sequence[nn.Module], copies: Sequence[HostCopy], device: torch.device) -> None:
        self._copies = copies
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._next = [(index + 1) % len(blocks) for index in range(len(blocks))]
        self._last: int | None = None
        self._buffers: list[_Buffer] = []
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._enter, index))
            block.register_forward_hook(partial(self._leave, index), always_call=True)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of both buffers."""
        return 2 * max(copy.nbytes for copy in self._copies)

    def free(self) -> None:
        """Give the buffers back. The caller waits for the device first; the next forward makes new ones."""
        self._buffers.clear()
        self._last = None

    def _enter(self, index: int, *_: Any) -> None:
        if not self._buffers:
            half = self.buffer_bytes // 2
            self._buffers = [_Buffer(torch.empty(half, dtype=torch.uint8, device=self._device)) for _ in range(2)]
        buffer = self._buffer_of(index)
        if buffer is None:
            buffer = self._fetch(index, self._buffers[0])
        assert buffer.arrived is not None, "every block in a buffer was copied there"
        torch.cuda.current_stream(self._device).wait_event(buffer.arrived)
        self._copies[index].use(buffer.memory)
        if self._last is not None:
            self._next[self._last] = index
        self._last = index
        following = self._next[index]
        if following != index and self._buffer_of(following) is None:
            self._fetch(following, next(other for other in self._buffers if other is not buffer))

    def _leave(self, index: int, *_: Any) -> None:
        self._copies[index].rest()
        if (buffer := self._buffer_of(index)) is not None:
            buffer.used = torch.cuda.current_stream(self._device).record_event()

    def _buffer_of(self, index: int) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.block == index), None)

    def _fetch(self, index: int, buffer: _Buffer) -> _Buffer:
        """Begin the copy of a block to ``buffer``, behind the forward of the block that was there."""
        if buffer.used is not None:
            self._stream.wait_event(buffer.used)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))  # which may still use the buffer's memory
        with torch.cuda.stream(self._stream):
            self._copies[index].copy_to(buffer.memory)
            buffer.arrived = self._stream.record_event()
        buffer.block, buffer.used = index, None
        return buffer
