"""Trainers' process groups: replicas join and leave them beside the barrier queue, and nothing waits for that."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..protocol.errors import Conflict, QueueFull, SafelightError, Unavailable, from_info
from ..protocol.operations import Join, Leave, Operate, OperationStep, Perform, Save, Update
from ..protocol.reports import Performed, Report
from ..protocol.tensor_sources import Broadcast
from .outbox import Outbox
from .replicas import Replica, Replicas
from .replies import Replies
from .transaction import RETRY_S

MOST_JOINING = 8
"""Joins in progress; each has a thread of every rank."""

LATE_S = 5.0
"""Seconds that replicas have after a join's own limit to report how it ended."""


@dataclass(slots=True, eq=False)
class _Asked:
    """A join or a leave, the replicas that have yet to answer it, and the reports of the others."""

    part: Operate
    operation: Join | Leave
    number: int
    replicas: set[int]
    expected: set[int]
    deadline: float = math.inf
    reports: dict[int, Report] = field(default_factory=dict)


class GroupOperations:
    """Owns the orders to join and to leave until all replicas have answered them."""

    def __init__(self, replicas: Replicas, outbox: Outbox, replies: Replies) -> None:
        self._replicas = replicas
        self._outbox = outbox
        self._replies = replies
        self._asked: dict[int, _Asked] = {}

    @property
    def next_turn(self) -> float:
        """When the first join is given up."""
        return min((asked.deadline for asked in self._asked.values()), default=math.inf)

    def join(self, part: Operate, join: Join, replicas: set[int], now: float) -> None:
        """Have ``replicas`` join. If one fails, all of them leave the group."""
        if not replicas:
            self._replies.failed(part, Unavailable("No replica is ready to join a group.", retry_after_s=RETRY_S))
        elif len(self._joins()) >= MOST_JOINING:
            busy = QueueFull(f"{MOST_JOINING} groups are being joined already.", retry_after_s=RETRY_S)
            self._replies.failed(part, busy)
        else:
            self._order(part, join, replicas, now + join.timeout_s + LATE_S)

    def leave(self, part: Operate, leave: Leave) -> None:
        """Have all replicas leave, also while they are joining."""
        for asked in [asked for asked in self._joins() if leave.group in (None, asked.operation.group)]:
            del self._asked[asked.number]  # the order to leave ends the join
            name = asked.operation.group
            self._replies.failed(asked.part, Conflict(f"The group {name!r} was destroyed while it was joined."))
        if replicas := {replica.number for replica in self._replicas if replica.has_loaded}:
            self._order(part, leave, replicas)
        else:
            self._replies.done(part)

    def refuse(self, part: Operate, error: SafelightError) -> None:
        """Fail a part that no replica has heard of."""
        self._replies.failed(part, error)
        self.abandon(part)

    def abandon(self, part: Operate) -> None:
        """Leave the group over which a trainer sends what nobody receives: it would wait, or be taken for the next."""
        match part.operation:
            case Update(source=Broadcast(group=group)) | Save(source=Broadcast(group=group)):
                self.leave(Operate("", Leave(group)), Leave(group))

    def answered(self, replica: int, message: Performed) -> bool:
        """Record an answer. Return whether it is one to these orders."""
        asked = self._asked.get(message.number)
        if asked is None or replica not in asked.expected:
            return False
        asked.expected.remove(replica)
        asked.reports[replica] = message.report
        if message.error is not None:
            self._fail(asked, from_info(message.error))
        else:
            self._end_if_complete(asked)
        return True

    def lost(self, replica: Replica) -> None:
        """A replica's process is gone, and its rank in every group with it."""
        for asked in [asked for asked in self._asked.values() if replica.number in asked.replicas]:
            asked.replicas.discard(replica.number)
            asked.expected.discard(replica.number)
            if isinstance(asked.operation, Join):
                self._fail(asked, Unavailable(f"Replica {replica.number} was lost.", retry_after_s=RETRY_S))
            else:
                self._end_if_complete(asked)

    def cancel(self, request_id: str) -> None:
        """The client of a join has gone away: nobody would use the group."""
        for asked in [asked for asked in self._joins() if asked.part.request_id == request_id]:
            self._forget(asked)

    def expire(self, now: float) -> None:
        """Give up joins that replicas have not reported on in time."""
        for asked in [asked for asked in self._joins() if asked.deadline <= now]:
            self._fail(asked, Unavailable(f"The group {asked.operation.group!r} could not be joined in time."))

    def _joins(self) -> list[_Asked]:
        return [asked for asked in self._asked.values() if isinstance(asked.operation, Join)]

    def _order(self, part: Operate, operation: Join | Leave, replicas: set[int], deadline: float = math.inf) -> None:
        asked = _Asked(part, operation, self._outbox.next_number(), set(replicas), set(replicas), deadline)
        self._asked[asked.number] = asked
        self._send(asked, "prepare")

    def _send(self, asked: _Asked, step: OperationStep) -> None:
        order = Perform(number=asked.number, step=step, is_primary=False, operation=asked.operation)
        self._outbox.order_each(asked.replicas, order)

    def _end_if_complete(self, asked: _Asked) -> None:
        if not asked.expected:
            del self._asked[asked.number]
            self._replies.done(asked.part, asked.reports)

    def _fail(self, asked: _Asked, error: SafelightError) -> None:
        self._forget(asked)
        self._replies.failed(asked.part, error)

    def _forget(self, asked: _Asked) -> None:
        """Have replicas leave the group, and end their joins."""
        del self._asked[asked.number]
        if isinstance(asked.operation, Join):
            self._send(asked, "release")
