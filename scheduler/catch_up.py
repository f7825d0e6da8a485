"""Catch-up: bring a stale replica to the committed state, by transactions whose target it is.

Missing weights come first: a donor writes a snapshot of them into shared memory, which only the target reads; without a
donor they are read again from disk. Then come the adapters, then it serves, and sleeps if the others do.
"""

from __future__ import annotations

import logging

from ..protocol.operations import Adapt, Operate, Operation, Sleep, TakeSnapshot, Update, snapshot_folder
from ..protocol.reports import Report
from ..protocol.tensor_sources import Files
from .barrier_queue import BarrierQueue
from .replica_sync import ReplicaSync
from .replicas import Replica
from .transaction import Running, internal
from .writes import is_on_disk

logger = logging.getLogger(__name__)

NEXT = TakeSnapshot([], "")
"""The first part of every catch-up. Its turn decides which operation it becomes."""


class CatchUp:
    """Enqueues catch-ups, and decides their operations."""

    def __init__(self, sync: ReplicaSync, queue: BarrierQueue) -> None:
        self._sync = sync
        self._queue = queue

    def joined(self, replica: Replica, *, changing: bool) -> None:
        """``replica`` has loaded. While the committed state is ``changing``, its turn is after that."""
        self._sync.joined(replica)
        if changing:
            self._sync.wait(replica)
            self._queue.enqueue(internal(NEXT, replica))
            return
        if self._sync.is_complete(replica):
            self._serve(replica)
        else:
            self._sync.wait(replica)
        self.advance()

    def advance(self) -> None:
        """Let the stale replicas serve that have everything, and enqueue those that can be given what they lack.

        The committed state must not be changing.
        """
        for replica in self._sync.stale():
            if self._sync.is_complete(replica):
                self._serve(replica)
            elif self._lacks(replica) is None:
                self._sync.report_orphaned(replica)
            elif not self._queue.has_target(replica):
                self._queue.enqueue(internal(NEXT, replica))

    def _serve(self, replica: Replica) -> None:
        self._sync.caught_up(replica)
        if self._sync.asleep:
            self._queue.enqueue(internal(Sleep([]), replica))

    def next_order(self, replica: Replica, operation: Operation) -> tuple[Replica, Operation] | None:
        """The replica and its operation; ``None`` if nothing is left to do."""
        match operation:
            case Sleep() if self._sync.asleep and self._sync.serves(replica):
                return replica, Sleep(sorted(self._sync.asleep))
            case TakeSnapshot() if self._sync.is_stale(replica):
                return self._lacks(replica)
            case Update() if self._sync.is_stale(replica):
                return replica, operation
        return None

    def _lacks(self, replica: Replica) -> tuple[Replica, Operation] | None:
        """The operation that gives it what it lacks, and its replica; ``None`` if there is none, or no need."""
        missing = self._sync.missing_modules(replica)
        if not missing:
            change = self._sync.missing_adapters(replica)
            return None if change is None else (replica, Adapt(change))
        if (donor := self._sync.donor()) is not None:
            return donor, TakeSnapshot(missing, snapshot_folder(replica.number))
        if (files := self._sync.files(missing)) is not None:
            return replica, self._update(files)
        return None

    def read_snapshot(self, report: Report) -> Operate:
        """The part in which the target reads what the donor has written."""
        return Operate("", self._update(Files(report.files, delete=True)))

    def _update(self, source: Files) -> Update:
        return Update(source=source, weight_version=self._sync.committed.base_version)

    def failed(self, replica: Replica, running: Running) -> None:
        """A step failed. A replica that refused it starts again; where the donor was lost, there may be another."""
        error, operation = running.error, running.part.operation
        if error is None or running.failed is None or not self._sync.is_stale(replica):
            return
        if isinstance(operation, Update) and is_on_disk(operation.source):
            logger.warning("the weights cannot be read again from disk: %s", error.message)
            self._sync.forget_files()
        else:
            self._sync.left(replica)  # else it would take part in operations until its end is known
            replica.failed(f"could not be brought to version {self._sync.committed.version}: {error.message}")
