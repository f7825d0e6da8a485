"""Trainers' process groups: replicas join and leave them beside the line of operations, and nothing waits for that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..protocol.errors import Conflict, QueueFull, SafelightError, Unavailable, from_info
from ..protocol.messages import ToWorker
from ..protocol.operations import Join, Leave, Operate, Perform, Step
from ..protocol.reports import Performed, Report
from .replicas import Replica
from .transaction import RETRY_S

MOST_JOINING = 8
"""Joins in progress; each has a thread of every rank."""

LATE_S = 5.0
"""Seconds after a join's own limit by which replicas have told how it ended."""


@dataclass(slots=True, eq=False)
class _Asked:
    """A join or a leave, the replicas that have yet to answer it, and what the others said."""

    part: Operate
    operation: Join | Leave
    number: int
    replicas: set[int]
    expected: set[int]
    deadline: float = math.inf
    reports: dict[int, Report] = field(default_factory=dict)


class Groups:
    """Owns the orders to join and to leave until all replicas have answered them.

    ``done`` and ``fail`` answer whoever has asked.
    """

    def __init__(
        self,
        numbers: Iterator[int],
        to_replica: Callable[[int, ToWorker], None],
        *,
        done: Callable[[Operate, dict[int, Report]], None],
        fail: Callable[[Operate, SafelightError], None],
    ) -> None:
        self._numbers = numbers
        self._to_replica = to_replica
        self._tell_done = done
        self._tell_failed = fail
        self._asked: dict[int, _Asked] = {}

    @property
    def next_turn(self) -> float:
        """When the first join is given up."""
        return min((asked.deadline for asked in self._asked.values()), default=math.inf)

    def join(self, part: Operate, join: Join, replicas: set[int], now: float) -> None:
        """Have ``replicas`` join; whoever fails, all of them are out of the group."""
        if not replicas:
            self._tell_failed(part, Unavailable("No replica is ready to join a group.", retry_after_s=RETRY_S))
        elif len(self._joins()) >= MOST_JOINING:
            busy = QueueFull(f"{MOST_JOINING} groups are being joined already.", retry_after_s=RETRY_S)
            self._tell_failed(part, busy)
        else:
            self._order(part, join, replicas, now + join.timeout_s + LATE_S)

    def leave(self, part: Operate, leave: Leave, replicas: set[int]) -> None:
        """Have ``replicas`` leave, also while they are joining; a group that nobody has is left already."""
        for asked in [asked for asked in self._joins() if leave.group in (None, asked.operation.group)]:
            del self._asked[asked.number]  # the replicas give it up as they are told to leave
            name = asked.operation.group
            self._tell_failed(asked.part, Conflict(f"The group {name!r} was destroyed while it was joined."))
        if replicas:
            self._order(part, leave, replicas)
        else:
            self._tell_done(part, {})

    def answered(self, replica: int, message: Performed) -> bool:
        """What a replica says, if it is of one of these orders."""
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
        """A replica's process is gone, and with it its place in every group."""
        for asked in [asked for asked in self._asked.values() if replica.number in asked.replicas]:
            asked.replicas.discard(replica.number)
            asked.expected.discard(replica.number)
            if isinstance(asked.operation, Join):
                self._fail(asked, Unavailable(f"Replica {replica.number} was lost.", retry_after_s=RETRY_S))
            else:
                self._end_if_complete(asked)

    def cancel(self, request_id: str) -> None:
        """The client of a join is gone: nobody would use the group."""
        for asked in [asked for asked in self._joins() if asked.part.request_id == request_id]:
            self._forget(asked)

    def expire(self, now: float) -> None:
        """Give up joins whose time is over though replicas say nothing of them."""
        for asked in [asked for asked in self._joins() if asked.deadline <= now]:
            self._fail(asked, Unavailable(f"The group {asked.operation.group!r} could not be joined in time."))

    def _joins(self) -> list[_Asked]:
        return [asked for asked in self._asked.values() if isinstance(asked.operation, Join)]

    def _order(self, part: Operate, operation: Join | Leave, replicas: set[int], deadline: float = math.inf) -> None:
        asked = _Asked(part, operation, next(self._numbers), set(replicas), set(replicas), deadline)
        self._asked[asked.number] = asked
        self._tell(asked, "prepare")

    def _tell(self, asked: _Asked, step: Step) -> None:
        for number in sorted(asked.replicas):
            self._to_replica(number, Perform(number=asked.number, step=step, leads=False, operation=asked.operation))

    def _end_if_complete(self, asked: _Asked) -> None:
        if not asked.expected:
            del self._asked[asked.number]
            self._tell_done(asked.part, asked.reports)

    def _fail(self, asked: _Asked, error: SafelightError) -> None:
        self._forget(asked)
        self._tell_failed(asked.part, error)

    def _forget(self, asked: _Asked) -> None:
        """Have the replicas leave what they have joined, and end what they have begun."""
        del self._asked[asked.number]
        if isinstance(asked.operation, Join):
            self._tell(asked, "release")
