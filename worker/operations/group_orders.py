"""Joins and leaves trainers' process groups, while the replica keeps serving.

Every rank begins a join in the step in which the order arrives, and continues it in a thread. The group is usable when
all ranks have joined: once the leader's own join has ended, it has all ranks asked in one of the next steps.
"""

from __future__ import annotations

import msgspec

from ...protocol.errors import ErrorInfo, SafelightError
from ...protocol.operations import Join, Leave, Perform
from ...protocol.reports import Performed, Report
from ..parallel.lockstep import SettleJoin
from ..parallel.ranks import Ranks
from ..weights.transport.groups import ProcessGroups


class _Outcome(msgspec.Struct, frozen=True):
    """The state of one rank's join."""

    ended: bool = True
    error: ErrorInfo | None = None


class GroupOrders:
    """This rank's part. Every rank takes the same orders, in the same order."""

    def __init__(self, groups: ProcessGroups, ranks: Ranks) -> None:
        self._groups = groups
        self._ranks = ranks

    @staticmethod
    def include(order: Perform) -> bool:
        """True if ``order`` is about groups."""
        return isinstance(order.operation, Join | Leave)

    def perform(self, order: Perform) -> Performed | None:
        """Do it, or begin to. :meth:`settle` answers a join; nobody answers the release of one."""
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
        raise AssertionError("include() admits joins and leaves only")

    def due(self) -> list[SettleJoin]:
        """Joins to settle in this step."""
        return [SettleJoin(number, late) for number, late in self._groups.due()]

    @property
    def next_look_s(self) -> float:
        return self._groups.next_look_s

    def settle(self, asked: SettleJoin) -> Performed | None:
        """Ask every rank for the state of its join; returns the answer once all have joined, or one has failed."""
        if not self._groups.is_joining(asked.number):  # every rank gave it up in this step
            return None
        outcomes = [
            msgspec.msgpack.decode(one, type=_Outcome) for one in self._ranks.all_gather_bytes(self._outcome(asked))
        ]
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
