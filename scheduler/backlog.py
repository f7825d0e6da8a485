"""The limits of waiting work: how many operations, and how many bytes clients have sent."""

from __future__ import annotations

from collections.abc import Iterable

from ..protocol.config import Config
from ..protocol.errors import QueueFull
from ..protocol.messages import TO_SCHEDULER, ToScheduler
from ..protocol.operations import Abort, Commit, Operate, Wake

MORE_ENDINGS = 8
"""Further operations that may wait if they end a wait."""

RETRY_S = 5.0
"""When to ask again: most operations take seconds."""


def nbytes_of(message: ToScheduler) -> int:
    """Everything that a message carries: texts, numbers, images, noise, payloads."""
    return sum(memoryview(frame).nbytes for frame in TO_SCHEDULER.encode(message))


class Backlog:
    """The sizes of the operations that wait. Callers pass the operations themselves."""

    def __init__(self, config: Config) -> None:
        self._max = config.max_operations
        self._max_mb = config.max_queue_mb
        self._sizes: dict[str, int] = {}

    def admit(self, part: Operate, waiting: Iterable[Operate]) -> QueueFull | None:
        """Why ``part`` may not wait behind ``waiting``. The first one always may."""
        known = [other.request_id for other in waiting]
        self._sizes = {request_id: self._sizes[request_id] for request_id in known if request_id in self._sizes}
        size, max_waiting = nbytes_of(part), self._max
        if isinstance(part.operation, Abort | Commit | Wake):
            max_waiting += MORE_ENDINGS
        if len(known) >= max_waiting:
            return QueueFull(
                f"{len(known)} operations wait already, and no more may (--max-operations). "
                f"Ask again in {RETRY_S:.0f} s.",
                retry_after_s=RETRY_S,
            )
        if known and self.nbytes + size > self._max_mb * 2**20:
            return QueueFull(
                f"Operations of {self.nbytes >> 20} MB wait already, and {self._max_mb} MB may (--max-queue-mb). "
                f"Ask again in {RETRY_S:.0f} s.",
                retry_after_s=RETRY_S,
            )
        self._sizes[part.request_id] = size
        return None

    @property
    def nbytes(self) -> int:
        """The bytes of the operations that waited at the last :meth:`admit`, with the one that it admitted."""
        return sum(self._sizes.values())

    def nbytes_among(self, waiting: Iterable[Operate]) -> int:
        return sum(self._sizes.get(part.request_id, 0) for part in waiting)
