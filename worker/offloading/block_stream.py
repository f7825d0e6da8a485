"""Streams a component's blocks through two rooms on the GPU: one computes while the next one is copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .host_copy import HostCopy


@dataclass(slots=True, eq=False)
class _Room:
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
        self._rooms: list[_Room] = []
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._enter, index))
            block.register_forward_hook(partial(self._leave, index), always_call=True)

    @property
    def room_bytes(self) -> int:
        """Bytes of both rooms."""
        return 2 * max(copy.nbytes for copy in self._copies)

    def free(self) -> None:
        """Give the rooms back. The caller waits for the device first; the next forward makes new ones."""
        self._rooms.clear()
        self._last = None

    def _enter(self, index: int, *_: Any) -> None:
        if not self._rooms:
            half = self.room_bytes // 2
            self._rooms = [_Room(torch.empty(half, dtype=torch.uint8, device=self._device)) for _ in range(2)]
        room = self._room_of(index)
        if room is None:
            room = self._fetch(index, self._rooms[0])
        assert room.arrived is not None, "every block in a room was copied there"
        torch.cuda.current_stream(self._device).wait_event(room.arrived)
        self._copies[index].use(room.memory)
        if self._last is not None:
            self._next[self._last] = index
        self._last = index
        following = self._next[index]
        if following != index and self._room_of(following) is None:
            self._fetch(following, next(other for other in self._rooms if other is not room))

    def _leave(self, index: int, *_: Any) -> None:
        self._copies[index].rest()
        if (room := self._room_of(index)) is not None:
            room.used = torch.cuda.current_stream(self._device).record_event()

    def _room_of(self, index: int) -> _Room | None:
        return next((room for room in self._rooms if room.block == index), None)

    def _fetch(self, index: int, room: _Room) -> _Room:
        """Begin the copy of a block to ``room``, behind the forward of the block that was there."""
        if room.used is not None:
            self._stream.wait_event(room.used)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))  # which may still use the room's memory
        with torch.cuda.stream(self._stream):
            self._copies[index].copy_to(room.memory)
            room.arrived = self._stream.record_event()
        room.block, room.used = index, None
        return room
