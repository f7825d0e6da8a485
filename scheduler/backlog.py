"""How much may wait: the bytes of what clients have sent, counted as they came, and how many operations."""

from __future__ import annotations

from collections.abc import Iterable

from ..protocol.config import Config
from ..protocol.errors import QueueFull
from ..protocol.messages import TO_SCHEDULER, ToScheduler
from ..protocol.operations import Abort, Commit, Operate, Wake

ENDINGS_MORE = 8
"""Operations that end a wait, for which there is room where others find none."""

RETRY_S = 5.0
"""When it is worth asking again: most operations take seconds."""


def nbytes_of(message: ToScheduler) -> int:
    """Everything that a message carries: texts, numbers, images, noise, payloads."""
    return sum(memoryview(frame).nbytes for frame in TO_SCHEDULER.encode(message))


class Backlog:
    """Operations that wait. It is given them anew each time, and remembers only how large they are."""

    def __init__(self, config: Config) -> None:
        self._most = config.max_operations
        self._most_mb = config.max_queue_mb
        self._sizes: dict[str, int] = {}

    def admit(self, part: Operate, waiting: Iterable[Operate]) -> QueueFull | None:
        """Why ``part`` may not wait behind ``waiting``, if it may not; the first one always may."""
        known = [other.request_id for other in waiting]
        self._sizes = {request_id: self._sizes[request_id] for request_id in known if request_id in self._sizes}
        size, most = nbytes_of(part), self._most
        if isinstance(part.operation, Abort | Commit | Wake):
            most += ENDINGS_MORE
        if len(known) >= most:
            return QueueFull(
                f"{len(known)} operations wait already, and no more may (--max-operations). "
                f"Ask again in {RETRY_S:.0f} s.",
                retry_after_s=RETRY_S,
            )
        if known and self.nbytes + size > self._most_mb * 2**20:
            return QueueFull(
                f"Operations of {self.nbytes >> 20} MB wait already, and {self._most_mb} MB may (--max-queue-mb). "
                f"Ask again in {RETRY_S:.0f} s.",
                retry_after_s=RETRY_S,
            )
        self._sizes[part.request_id] = size
        return None

    @property
    def nbytes(self) -> int:
        """Of the operations that waited when :meth:`admit` was last asked, with the one that it let in."""
        return sum(self._sizes.values())

    def nbytes_among(self, waiting: Iterable[Operate]) -> int:
        return sum(self._sizes.get(part.request_id, 0) for part in waiting)
