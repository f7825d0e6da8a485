"""Orders about trainers' process groups, which the ranks of a replica follow beside everything else.

A join begins on every rank in the turn that the order comes in, goes on in a thread of each, and counts when all of
them have joined: the leader, when its own has ended, has the others asked in one of the next turns.
"""

from __future__ import annotations

import msgspec

from ..protocol.errors import ErrorInfo, SafelightError
from ..protocol.operations import Join, Leave, Perform
from ..protocol.reports import Performed, Report
from .parallel.ranks import Ranks
from .parallel.team import SettleJoin
from .weights.transport.groups import Groups


class _Outcome(msgspec.Struct, frozen=True):
    """How far a rank is with a join."""

    ended: bool = True
    error: ErrorInfo | None = None


class GroupOrders:
    """This rank's part in them; every rank takes the same ones in the same order."""

    def __init__(self, groups: Groups, ranks: Ranks) -> None:
        self._groups = groups
        self._ranks = ranks

    @staticmethod
    def include(order: Perform) -> bool:
        """Whether ``order`` is one of these."""
        return isinstance(order.operation, Join | Leave)

    def perform(self, order: Perform) -> Performed | None:
        """Do it, or begin to. The answer to a join comes from :meth:`settle`, to the release of one comes none."""
        match order.operation:
            case Join() if order.step == "release":
                self._groups.forget(order.number)
                return None
            case Join(group=name):
                try:
                    self._groups.join(order.number, order.operation)
                except SafelightError as error:
                    return Performed(order.number, order.step, Report(), error.info())
                return None
            case Leave(group=name):
                left = self._groups.leave(name)
                return Performed(order.number, order.step, Report(left=left, ranks=self._ranks.size))
        raise AssertionError("include() has said that it is none of these")

    def due(self) -> list[SettleJoin]:
        """Joins that are to be settled in this turn."""
        return [SettleJoin(number, late) for number, late in self._groups.due()]

    @property
    def next_look_s(self) -> float:
        return self._groups.next_look_s

    def settle(self, asked: SettleJoin) -> Performed | None:
        """Ask every rank how far it is; the answer to the join when all have joined, or one of them never will."""
        if not self._groups.is_joining(asked.number):  # it was given up in this very turn, on every rank
            return None
        outcomes = [msgspec.msgpack.decode(one, type=_Outcome) for one in self._ranks.exchange(self._outcome(asked))]
        error = next((one.error for one in outcomes if one.error is not None), None)
        if error is not None:
            self._groups.forget(asked.number)
            return Performed(asked.number, "prepare", Report(), error)
        if not all(one.ended for one in outcomes):
            return None
        self._groups.settle(asked.number)
        return Performed(asked.number, "prepare", Report(ranks=self._ranks.size))

    def _outcome(self, asked: SettleJoin) -> bytes:
        try:
            outcome = _Outcome(self._groups.has_joined(asked.number, late=asked.late))
        except SafelightError as error:
            outcome = _Outcome(error=error.info())
        return msgspec.msgpack.encode(outcome)
