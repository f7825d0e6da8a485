"""The transaction driver: takes one transaction after the other from the barrier queue, and sees it to its end."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ..protocol.errors import Conflict, NotFound, SafelightError
from ..protocol.operations import Operate
from ..protocol.reports import Performed
from .barrier_queue import BarrierQueue
from .catch_up import CatchUp
from .groups import GroupOperations
from .outbox import Outbox
from .replicas import Replica
from .request import Request
from .steps import Steps
from .transaction import Transaction

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Driver:
    """Owns the current transaction.

    ``resume`` takes a request that is queued behind a transaction no longer, ``end_all`` ends all requests that came
    before, and ``drained`` says whether none of them is left.
    """

    _queue: BarrierQueue
    _steps: Steps
    _catch_up: CatchUp
    _groups: GroupOperations
    _outbox: Outbox
    _max_hold_s: float
    _resume: Callable[[Request], None]
    _end_all: Callable[[SafelightError], None]
    _drained: Callable[[], bool]
    current: Transaction | None = None
    given_up: dict[str, str] = field(default_factory=dict)
    """The last session that was given up, by its id, and why."""

    @property
    def barrier_passed(self) -> bool:
        """Replicas may be at work on the current transaction, so no request may start."""
        return self.current is not None and self.current.barrier_passed

    @property
    def next_turn(self) -> float:
        """When the current session is given up, unless a part of it comes before; never while replicas work on one."""
        idle = self.current is not None and self.current.running is None
        return self.current.deadline if self.current is not None and idle else math.inf

    def session(self, update_id: str | None) -> Transaction | None:
        """The current session, if that is its id; ``None`` stands for any."""
        transaction = self.current
        if transaction is None or transaction.session is None:
            return None
        return transaction if update_id in (None, transaction.session.update_id) else None

    def abort(self, transaction: Transaction, part: Operate) -> bool:
        """End a session after the current step, and refuse the parts that wait. Return whether it has ended already."""
        waiting = list(transaction.parts)
        transaction.parts.clear()
        for other in waiting:
            self._groups.refuse(other, Conflict("The update was aborted before this was done."))
        if transaction.barrier_passed:
            transaction.parts.append(part)
            return False
        self.current = None
        return True

    def cancel(self, request_id: str) -> None:
        """The client of a part has gone away: it does not begin, but ends as usual if it has begun."""
        transaction = self.current
        if transaction is None:
            return
        cancelled = [part for part in transaction.parts if part.request_id == request_id]
        transaction.parts = deque(part for part in transaction.parts if part.request_id != request_id)
        for part in cancelled:
            self._groups.abandon(part)
        if not transaction.barrier_passed and not transaction.parts:
            self.current = None

    def answered(self, replica: int, message: Performed) -> bool:
        """Record an answer. Return whether it belongs to the current step."""
        running = self.current.running if self.current is not None else None
        return running is not None and running.takes(replica, message)

    def lost(self, replica: Replica) -> None:
        """A replica's process is gone, and its part in the current transaction with it."""
        self._queue.remove_target(replica)
        if self.current is None:
            return
        if self.current.participants is not None:
            self.current.participants.discard(replica.number)
        if self.current.running is not None and replica.number in self.current.running.replicas:
            self.current.running.drop(replica.number)

    def advance(self, now: float) -> None:
        """Do whatever can be done now."""
        while self._step(now):
            pass

    def _step(self, now: float) -> bool:
        """Do one thing. Return whether there may be another."""
        transaction = self.current
        if transaction is None:
            return self._take_next(now)
        if transaction.ended:
            self._end(transaction)
            return True
        if transaction.running is not None:
            return self._finish_step(transaction, now)
        if not transaction.barrier_passed:
            return self._pass_barrier(transaction, now)
        return self._next_part(transaction, now)

    def _take_next(self, now: float) -> bool:
        item = self._queue.take()
        if isinstance(item, Request):
            self._resume(item)
        elif item is not None:
            self.current = item
            item.since = now
            if item.barrier == "abort":
                make_way = "The request was aborted to make way for a change of the weights. Send it again."
                self._end_all(Conflict(make_way))
        return item is not None

    def _finish_step(self, transaction: Transaction, now: float) -> bool:
        assert transaction.running is not None
        if transaction.running.expected:
            return False
        self._steps.finish(transaction, transaction.running, now)
        return True

    def _pass_barrier(self, transaction: Transaction, now: float) -> bool:
        transaction.barrier_passed = transaction.barrier == "in_place" or self._drained()
        if transaction.barrier_passed and transaction.session is not None:
            transaction.ceiling = now + self._max_hold_s
        return transaction.barrier_passed

    def _next_part(self, transaction: Transaction, now: float) -> bool:
        """Begin the next part. Without one, a session goes on until its time is over; anything else has ended."""
        session = transaction.session
        if session is not None and now >= transaction.ceiling:
            self._give_up(transaction, f"it held back generation for {self._max_hold_s:g} s (--max-update-hold-s)")
        elif transaction.parts:
            self._steps.begin(transaction, transaction.parts.popleft(), now)
        elif session is None:
            transaction.ended = True
        elif transaction.participants == set():
            self._give_up(transaction, "its replicas were lost")
        elif now >= transaction.deadline:
            self._give_up(transaction, f"nothing of it came for {session.timeout_s:g} s")
        else:
            return False
        return True

    def _give_up(self, transaction: Transaction, reason: str) -> None:
        """End a session that its client does not end."""
        assert transaction.session is not None
        logger.warning("the update %s is aborted: %s", transaction.session.update_id, reason)
        self.given_up = {transaction.session.update_id: f"it was aborted, as {reason}"}
        self._outbox.undo(transaction.participants or set(), "rollback")
        transaction.ended = True

    def _end(self, transaction: Transaction) -> None:
        """Parts that came meanwhile are for a session that is over."""
        self.current = None
        for part in transaction.parts:
            self._groups.refuse(part, NotFound("The update that this was a part of has ended."))
        transaction.parts.clear()
        self._catch_up.advance()
