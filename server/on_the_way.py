"""Bound the messages to the scheduler that wait in this process because it has not received them yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ..protocol.errors import Unavailable

_RETRY_AFTER_S = 5.0


class OnTheWay:
    """Bounds the bytes of messages that the scheduler has yet to take; one alone may have any size."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0
        self._heard = 0
        self._sizes: deque[tuple[int, int]] = deque()  # of each message, behind its number
        self.nbytes = 0

    def check(self, frames: Sequence[bytes | memoryview]) -> None:
        """Raises ``Unavailable``."""
        if self.nbytes and self.nbytes + _size(frames) > self._most:
            raise Unavailable(
                f"The scheduler has yet to take {self.nbytes >> 20} MB of earlier requests. "
                f"Ask again in {_RETRY_AFTER_S:.0f} s.",
                retry_after_s=_RETRY_AFTER_S,
            )

    def sent(self, frames: Sequence[bytes | memoryview]) -> None:
        self._count += 1
        self._sizes.append((self._count, _size(frames)))
        self.nbytes += self._sizes[-1][1]

    def heard(self, count: int) -> None:
        """The scheduler has taken so many messages; one that has taken fewer than before is another one."""
        if count < self._heard:
            self._sizes.clear()
            self._count = self.nbytes = 0
        self._heard = count
        while self._sizes and self._sizes[0][0] <= count:
            self.nbytes -= self._sizes.popleft()[1]


def _size(frames: Sequence[bytes | memoryview]) -> int:
    return sum(memoryview(frame).nbytes for frame in frames)
