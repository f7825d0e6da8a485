"""Operations: one after the other, in their order of arrival among the requests, on every replica or on none.

Whatever arrives after an operation is queued behind it until it is done. A session (a begun update) is one operation
of many parts. Like the dispatcher, this decides from messages and an explicit ``now``, and leaves orders in the outbox.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..protocol.errors import NotFound, SafelightError
from ..protocol.operations import Abort, Begin, Commit, Join, Leave, Operate, Save, Update
from ..protocol.replicas import Hold
from ..protocol.reports import Performed
from .backlog import Backlog
from .barrier_queue import BarrierQueue
from .catch_up import CatchUp
from .driver import Driver
from .groups import GroupOperations
from .replica_sync import ReplicaSync
from .replicas import Replica
from .replies import Replies
from .transaction import Transaction


@dataclass(slots=True, eq=False)
class Operations:
    """Takes operations in, and has the driver do them."""

    _sync: ReplicaSync
    _queue: BarrierQueue
    _replies: Replies
    _backlog: Backlog
    _groups: GroupOperations
    _catch_up: CatchUp
    _driver: Driver

    @property
    def blocks(self) -> bool:
        """A request that comes now is queued behind an operation."""
        return self._driver.current is not None or bool(self._queue)

    @property
    def lets_run(self) -> bool:
        """Requests that came before may still be started."""
        return not self._driver.barrier_passed

    @property
    def next_turn(self) -> float:
        """When something is given up if nothing happens before."""
        return min(self._groups.next_turn, self._driver.next_turn)

    def hold_at(self, now: float) -> Hold | None:
        """The operation that holds back everything behind it."""
        return self._driver.current.hold(now) if self._driver.current is not None else None

    @property
    def session_id(self) -> str | None:
        transaction = self._driver.session(None)
        return transaction.session.update_id if transaction is not None and transaction.session is not None else None

    def waiting(self) -> list[Operate]:
        """Clients' operations that have not begun yet, and parts of the session."""
        current = [self._driver.current] if self._driver.current is not None else []
        transactions = [*current, *self._queue.transactions()]
        return [part for transaction in transactions for part in transaction.parts if part.request_id]

    def waiting_bytes(self) -> int:
        return self._backlog.nbytes_among(self.waiting())

    def add(self, part: Operate, now: float) -> None:
        """An operation has arrived."""
        match part.operation:
            case Join() as join:
                self._groups.join(part, join, self._sync.participants(to_update=False), now)
            case Leave() as leave:
                self._groups.leave(part, leave)
            case (
                Update(update_id=str() as update_id)
                | Save(update_id=str() as update_id)
                | Commit(update_id=update_id)
                | Abort(update_id=update_id)
            ):
                self._add_to_session(part, update_id)
            case _:
                if (refusal := self._backlog.admit(part, self.waiting())) is not None:
                    self._groups.refuse(part, refusal)
                else:
                    self._queue.enqueue(_transaction(part))
        self.advance(now)

    def _add_to_session(self, part: Operate, update_id: str | None) -> None:
        """A part of the session, or its end; an operator ends whichever there is, without its id."""
        transaction = self._driver.session(update_id)
        if (refusal := self._refusal_of(transaction, part, update_id)) is not None:
            self._groups.refuse(part, refusal)
        elif transaction is not None and not isinstance(part.operation, Abort):
            transaction.parts.append(part)
        elif transaction is not None and self._driver.abort(transaction, part):
            self._replies.done(part)

    def _refusal_of(
        self, transaction: Transaction | None, part: Operate, update_id: str | None
    ) -> SafelightError | None:
        if transaction is None:
            reason = self._driver.given_up.get(update_id or "", "it ended, or never was")
            named = "begun update" if update_id is None else f"begun update {update_id!r}"
            return NotFound(f"There is no {named}; {reason}.")
        refusal: SafelightError | None = self._backlog.admit(part, self.waiting())
        if refusal is None and isinstance(part.operation, Update | Save):
            refusal = transaction.refusal_of(part.operation.source)
        return refusal

    def cancel(self, request_id: str) -> None:
        """The client of an operation has gone away. It does not begin, but ends as usual if it has begun."""
        if not request_id:  # a server's greeting; internal operations have no id either
            return
        self._groups.cancel(request_id)
        for part in self._queue.cancel(request_id):
            self._groups.abandon(part)
        self._driver.cancel(request_id)

    def answered(self, replica: int, message: Performed, now: float) -> None:
        """A replica has done a step."""
        if not self._groups.answered(replica, message) and self._driver.answered(replica, message):
            self.advance(now)

    def lost(self, replica: Replica, now: float) -> None:
        """A replica's process is gone."""
        self._sync.left(replica)
        self._groups.lost(replica)
        self._driver.lost(replica)
        self.advance(now)

    def joined(self, replica: Replica, now: float) -> None:
        """A replica has loaded its model."""
        self._catch_up.joined(replica, changing=self._driver.barrier_passed)
        self.advance(now)

    def advance(self, now: float) -> None:
        """Do whatever can be done now."""
        self._groups.expire(now)
        self._driver.advance(now)


def _transaction(part: Operate) -> Transaction:
    """A session if ``part`` begins one, and otherwise a transaction of it alone."""
    if isinstance(part.operation, Begin):
        version = part.operation.weight_version
        return Transaction(part.barrier, deque([part]), part.operation, weight_version=version)
    return Transaction(part.barrier, deque([part]))
