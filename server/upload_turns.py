"""Turns for large bodies: a few clients send at a time, and a slow one makes way for those that wait."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from ..protocol.errors import QueueFull

AT_ONCE = 8
"""Bodies that are received at a time; others wait."""

MOST_WAITING = 64

SLOW_BYTES_S = 1 << 20
"""A body that comes more slowly than this makes way when others wait."""

WINDOW_S = 10.0
"""Seconds over which the pace of a body is measured, from its begin on."""

_LOOK_S = 1.0

_RETRY_S = 5.0


class Turn:
    """One body that is being received."""

    def __init__(self) -> None:
        self.must_end = False
        """Another one has its turn now."""
        self._timer: asyncio.Timeout | None = None
        self._since = asyncio.get_running_loop().time()
        self._received = 0
        self._pace: float | None = None

    def timed_by(self, timer: asyncio.Timeout) -> None:
        """``timer`` ends the body when it expires."""
        self._timer = timer

    def received(self, count: int) -> None:
        self._received += count
        self._measure()

    def pace(self) -> float | None:
        """Bytes a second of late; ``None`` for a body that has only begun."""
        self._measure()
        return self._pace

    def make_way(self) -> None:
        self.must_end = True
        if self._timer is not None and not self._timer.expired():
            self._timer.reschedule(asyncio.get_running_loop().time())

    def _measure(self) -> None:
        passed_s = asyncio.get_running_loop().time() - self._since
        if passed_s >= WINDOW_S:
            self._pace, self._received = self._received / passed_s, 0
            self._since += passed_s


class Turns:
    """Bodies in the order in which they came. Raises ``QueueFull`` where too many wait already."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(AT_ONCE)
        self._waiting = 0
        self._receiving: list[Turn] = []

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[Turn]:
        await self._wait()
        turn = Turn()
        self._receiving.append(turn)
        try:
            yield turn
        finally:
            self._receiving.remove(turn)
            self._free.release()

    async def _wait(self) -> None:
        if self._waiting + len(self._receiving) >= AT_ONCE + MOST_WAITING:
            raise QueueFull(
                f"{AT_ONCE} bodies are being received and {MOST_WAITING} wait already. Ask again in {_RETRY_S:.0f} s.",
                retry_after_s=_RETRY_S,
            )
        self._waiting += 1
        acquiring = asyncio.ensure_future(self._free.acquire())
        try:
            while not (await asyncio.wait({acquiring}, timeout=_LOOK_S))[0]:
                self._end_slowest()
        except BaseException:
            if not acquiring.cancel():
                self._free.release()
            raise
        finally:
            self._waiting -= 1

    def _end_slowest(self) -> None:
        paces = [(turn.pace(), turn) for turn in self._receiving if not turn.must_end]
        slow = [(pace, turn) for pace, turn in paces if pace is not None and pace < SLOW_BYTES_S]
        if slow:
            min(slow, key=lambda one: one[0])[1].make_way()
