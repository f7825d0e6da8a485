"""The steps of one part of a transaction, each done by every participant before the next, or undone on all of them."""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol.adapters import AdapterChange, SetAdapters
from ..protocol.errors import Conflict, Unavailable
from ..protocol.operations import (
    Abort,
    Adapt,
    Begin,
    Commit,
    Operate,
    Operation,
    OperationStep,
    Save,
    Settled,
    Sleep,
    TakeSnapshot,
    Update,
    Wake,
)
from .catch_up import CatchUp
from .groups import GroupOperations
from .outbox import Outbox
from .recent_adapters import RecentAdapters
from .replica_sync import ReplicaSync
from .replicas import Replica, Replicas
from .replies import Replies
from .transaction import RETRY_S, Failure, Running, Transaction


@dataclass(slots=True, eq=False)
class Steps:
    """Begins parts, and goes on whenever all replicas have answered a step."""

    _replicas: Replicas
    _sync: ReplicaSync
    _catch_up: CatchUp
    _groups: GroupOperations
    _outbox: Outbox
    _replies: Replies
    _recent: RecentAdapters

    def begin(self, transaction: Transaction, part: Operate, now: float) -> None:
        if transaction.target is not None:
            self._begin_internal(transaction, part.operation, transaction.target)
        elif isinstance(part.operation, Settled):
            self._replies.done(part)
        else:
            self._begin_on(self._participants(transaction, part.operation), transaction, part, now)

    def _begin_on(self, participants: set[int], transaction: Transaction, part: Operate, now: float) -> None:
        serving = {replica.number for replica in self._replicas if self._sync.serves(replica)}
        if not participants:
            not_ready = f"No replica is ready: {self._replicas.reasons()}."
            self._replies.failed(part, Unavailable(not_ready, retry_after_s=RETRY_S))
            transaction.ended = True
        elif isinstance(part.operation, Adapt | Save) and not participants & serving:
            no_weights = "No replica has the weights that adapters are for."
            self._groups.refuse(part, Unavailable(no_weights, retry_after_s=RETRY_S))
        else:
            transaction.extend(now)
            self._begin_part(transaction, Running(part, self._outbox.next_number(), set(participants)))

    def _begin_part(self, transaction: Transaction, running: Running) -> None:
        match running.part.operation:
            case Begin():
                self._replies.done(running.part)
            case Commit() as commit:
                self._begin_commit(transaction, running, commit)
            case Abort() as abort:
                self._order(transaction, running, "rollback", abort)
            case operation:
                self._prepare(transaction, running, operation)

    def _participants(self, transaction: Transaction, operation: Operation) -> set[int]:
        if transaction.participants is not None:
            return transaction.participants
        if isinstance(operation, Wake):
            return self._sync.sleepers
        participants = self._sync.participants(to_update=isinstance(operation, Update | Begin))
        if transaction.session is not None:
            transaction.participants = participants
        return participants

    def _begin_internal(self, transaction: Transaction, operation: Operation, target: Replica) -> None:
        if (order := self._catch_up.next_order(target, operation)) is not None:
            replica, operation = order
            part = Operate("", operation)
            self._prepare(transaction, Running(part, self._outbox.next_number(), {replica.number}), operation)

    def _begin_commit(self, transaction: Transaction, running: Running, commit: Commit) -> None:
        refusal = transaction.refusal_to_end(commit) or self._refusal_of(transaction, running)
        if refusal is not None:
            self._replies.failed(running.part, refusal)
        elif transaction.adapters:
            self._prepare(transaction, running, Adapt(transaction.adapters_change()))
        else:
            self._commit(transaction, running)

    def _prepare(self, transaction: Transaction, running: Running, operation: Operation) -> None:
        if isinstance(operation, Adapt):
            operation = self._recent.annotated(operation, self._sync.committed.adapters.loaded)
        self._order(transaction, running, "prepare", operation)

    def _order(
        self, transaction: Transaction, running: Running, step: OperationStep, operation: Operation | None = None
    ) -> None:
        """Have all participants do ``step``, which ends when the last of them has answered."""
        transaction.running = running
        for replica, order in running.begin(step, operation):
            self._outbox.order(replica, order)

    def _commit(self, transaction: Transaction, running: Running) -> None:
        """Commit what the replicas have written, once it is in the journal.

        A target writes the journal too: it joined with one that had missed an update.
        """
        operation = running.part.operation
        own = operation.weight_version if isinstance(operation, Update | Commit) else None
        running.version = own or transaction.weight_version or self._sync.committed.next_version
        self._order(transaction, running, "journal" if self._sync.journal and transaction.writes.counts else "commit")

    def finish(self, transaction: Transaction, running: Running, now: float) -> None:
        """All replicas have answered a step."""
        transaction.running = None
        transaction.extend(now)
        if running.step == "prepare":
            running.compare()
        if running.undoes is not None:
            self._undone(running, running.undoes)
        elif running.error is not None and running.step != "commit":
            self._fail(transaction, running)
        elif running.step == "prepare" and isinstance(running.part.operation, Update | Adapt | Commit):
            self._order(transaction, running, "write")
        elif running.step == "write":
            self._written(transaction, running)
        elif running.step == "journal":
            self._order(transaction, running, "commit")
        elif running.step == "commit":
            self._committed(transaction, running)
        else:
            self._done(transaction, running)

    def _fail(self, transaction: Transaction, running: Running) -> None:
        if transaction.target is None and (memory := self._memory_before(running.part.operation)) is not None:
            self._move_back(transaction, running, memory)
            return
        self._undo(transaction, running)
        self._replies.failed(running.part, running.failure.error, running.failure.report)
        if transaction.target is not None:
            self._catch_up.failed(transaction.target, running)

    def _undo(self, transaction: Transaction, running: Running) -> None:
        """Have replicas release what they prepared or joined, or roll back what they wrote."""
        if isinstance(running.part.operation, Update | Save | Commit | Adapt):
            transaction.ended = running.step != "prepare"
            self._outbox.undo(running.replicas, "rollback" if transaction.ended else "release")

    def _memory_before(self, operation: Operation) -> Sleep | Wake | None:
        """The operation that undoes a sleep or a wake: the tags that were asleep before are asleep again."""
        match operation:
            case Sleep(tags=tags):
                return Wake(sorted(set(tags) - self._sync.asleep))
            case Wake(tags=tags):
                return Sleep(sorted(self._sync.asleep.intersection(tags)))
        return None

    def _move_back(self, transaction: Transaction, running: Running, operation: Sleep | Wake) -> None:
        """Undo a sleep or a wake as a step of its own, because it needs memory, which may be missing by now."""
        undo = Running(running.part, self._outbox.next_number(), set(running.replicas), undoes=running.failure)
        if undo.replicas and operation.tags:
            self._order(transaction, undo, "prepare", operation)
        else:
            self._undone(undo, running.failure)

    def _undone(self, undo: Running, failure: Failure) -> None:
        """Reply to a sleep or a wake that failed. If a replica could not wake again, the whole server is asleep."""
        operation = undo.part.operation
        if undo.error is not None and isinstance(operation, Sleep):
            self._sync.asleep.update(operation.tags)
            failure = failure.and_then(undo.error, "The server is asleep; wake it with POST /resume_memory_occupation.")
        elif undo.error is not None:
            failure = failure.and_then(undo.error, "The server is asleep, and not all of its memory is released.")
        self._replies.failed(undo.part, failure.error, failure.report)

    def _written(self, transaction: Transaction, running: Running) -> None:
        match running.part.operation:
            case Update() as update:
                self._part_written(transaction, running, update)
            case Adapt() as adapt:
                committed = self._sync.committed
                published = adapt.weight_version or committed.next_version
                running.version = published if adapt.publishes else committed.version or ""
                self._order(transaction, running, "commit")
            case _:
                self._commit(transaction, running)

    def _part_written(self, transaction: Transaction, running: Running, update: Update) -> None:
        transaction.written(update, running.reports.values())
        if (
            transaction.session is not None or not transaction.writes.counts
        ):  # an empty part is legal, and changes nothing
            self._replies.done(running.part, running.reports)
        elif transaction.target is None and (refusal := self._refusal_of(transaction, running)) is not None:
            self._undo(transaction, running)
            self._replies.failed(running.part, refusal)
        else:
            self._commit(transaction, running)

    def _refusal_of(self, transaction: Transaction, running: Running) -> Conflict | None:
        return self._sync.refusal_of(transaction.writes, running.replicas)

    def _committed(self, transaction: Transaction, running: Running) -> None:
        """All have committed that were not lost meanwhile."""
        transaction.ended = True
        if running.reports:
            self._record(transaction, running)
            self._catch_up.advance()
            self._replies.done(running.part, running.reports)
            return
        if transaction.target is None and transaction.writes.counts:
            self._sync.undecided(running.version, transaction.writes.counts)
        lost = running.error or Unavailable("Every replica was lost.", retry_after_s=RETRY_S)
        self._replies.failed(running.part, lost)

    def _record(self, transaction: Transaction, running: Running) -> None:
        operation = running.part.operation
        if isinstance(operation, Adapt):
            self._record_adapters(running, operation.change)
        elif transaction.target is not None:
            self._sync.received(transaction.target.number)
        else:
            if transaction.writes.counts:
                self._sync.updated(running.version, running.reports, transaction.writes)
            if transaction.adapters:
                self._record_adapters(running, transaction.adapters_change())

    def _record_adapters(self, running: Running, change: AdapterChange) -> None:
        adapters = running.reports[min(running.reports)].adapters
        assert adapters is not None, "a commit of adapters brings them"
        self._sync.adapted(adapters, running.version, running.reports)
        self._recent.used(change.nicknames if isinstance(change, SetAdapters) else (), adapters.loaded)

    def _done(self, transaction: Transaction, running: Running) -> None:
        match running.part.operation:
            case Sleep(tags=tags) if transaction.target is None:
                self._sync.asleep.update(tags)
            case Wake(tags=tags):
                self._sync.asleep.difference_update(tags)
            case Save() as part if transaction.session is not None:
                transaction.saved(part, running.reports.values())
            case TakeSnapshot():
                (snapshot,) = running.reports.values()
                transaction.parts.append(self._catch_up.read_snapshot(snapshot))
            case Abort():
                transaction.ended = True
        self._replies.done(running.part, running.reports)
