"""A transaction holds back everything behind it: one operation, or a session (a begun update) with its parts."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec.structs import replace

from ..protocol.adapters import AdapterSource, SetAdapters
from ..protocol.errors import InvalidRequest, SafelightError, Unavailable, from_info
from ..protocol.operations import Barrier, Begin, Commit, Operate, Operation, OperationStep, Perform, Save, Update
from ..protocol.replicas import Hold
from ..protocol.reports import Performed, Report
from ..protocol.tensor_sources import Source
from .replicas import Replica
from .writes import Writes, modules_of

RETRY_S = 5.0
"""When to ask again after a replica was lost: it comes back in seconds."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The error of a step, and the report of the replica that failed it."""

    error: SafelightError
    report: Report | None = None

    def and_then(self, undo: SafelightError, consequence: str) -> Failure:
        """This failure, after its undo failed too."""
        info = self.error.info()
        message = f"{info.message} Undoing it failed too: {undo.message} {consequence}"
        return Failure(from_info(replace(info, message=message)), self.report)


@dataclass(slots=True, eq=False)
class Running:
    """The step that ``replicas`` work on, those that have yet to answer it, and the reports of the others.

    Lost replicas are dropped from all of these. ``version`` is the one that will be committed. ``undoes`` is the
    failure of the part that this step undoes.
    """

    part: Operate
    number: int
    replicas: set[int]
    step: OperationStep = "prepare"
    expected: set[int] = field(default_factory=set)
    reports: dict[int, Report] = field(default_factory=dict)
    error: SafelightError | None = None
    failed: Report | None = None
    version: str = ""
    undoes: Failure | None = None

    @property
    def failure(self) -> Failure:
        assert self.error is not None, "the step has failed"
        return Failure(self.error, self.failed)

    def begin(self, step: OperationStep, operation: Operation | None = None) -> list[tuple[int, Perform]]:
        """Expect ``step`` of all replicas, of the first alone if it is the journal. Returns each one's order."""
        first, version = min(self.replicas), self.version or None
        self.step, self.expected = step, {first} if step == "journal" else set(self.replicas)
        self.reports.clear()
        order = Perform(number=self.number, step=step, is_primary=False, operation=operation, weight_version=version)
        return [(number, replace(order, is_primary=number == first)) for number in sorted(self.expected)]

    def takes(self, replica: int, message: Performed) -> bool:
        """Record an answer. Return whether it is one to this step, and not the last message of a lost process."""
        if (message.number, message.step) != (self.number, self.step) or replica not in self.expected:
            return False
        self.expected.remove(replica)
        self.reports[replica] = message.report
        if message.error is not None and (self.error is None or replica == min(self.reports)):
            self.error, self.failed = from_info(message.error), message.report
        return True

    def compare(self) -> None:
        """Fail the step if replicas were given different tensors."""
        first = min(self.reports, default=0)
        others = [number for number, report in self.reports.items() if report.given != self.reports[first].given]
        if others and self.error is None:
            self.error = InvalidRequest(
                f"Nothing was written: replica {min(others)} was given other tensors than replica {first}. "
                "Every rank of every replica needs the same full tensors."
            )

    def drop(self, replica: int) -> None:
        """Drop a lost replica.

        Commit, rollback and any other undo go on without it; a replica that was voting or writing the journal fails the
        step.
        """
        missed = replica in self.expected if self.step == "journal" else self.step not in ("commit", "rollback")
        if missed and self.error is None and self.undoes is None:
            self.error = Unavailable(
                f"Replica {replica} was lost; on the others everything is as it was.", retry_after_s=RETRY_S
            )
        self.replicas.discard(replica)
        self.expected.discard(replica)
        self.reports.pop(replica, None)


@dataclass(slots=True, eq=False)
class Transaction:
    """``participants`` are the replicas of a session, from its first part on; ``target`` is the one that an internal
    transaction is for.

    ``writes`` are those of its parts. ``adapters`` are those that came in parts, with the factors that are
    ``unpaired``, by nickname.
    """

    barrier: Barrier
    parts: deque[Operate] = field(default_factory=deque)
    session: Begin | None = None
    target: Replica | None = None
    barrier_passed: bool = False
    ended: bool = False
    participants: set[int] | None = None
    running: Running | None = None
    since: float = math.inf
    """When it began to hold back everything behind it."""
    deadline: float = math.inf
    """When a session ends, unless a part of it comes before."""
    ceiling: float = math.inf
    """When a session ends, however many parts of it come."""
    writes: Writes = field(default_factory=Writes)
    adapters: dict[str, AdapterSource] = field(default_factory=dict)
    unpaired: dict[str, list[str]] = field(default_factory=dict)
    weight_version: str | None = None
    """The version that the begin of a session gives the weights, or else the first part of it that was written."""

    def hold(self, now: float) -> Hold:
        """Describe it for a status, while it holds back everything behind it."""
        session, working = self.session, self.running is not None or bool(self.parts)
        part = self.running.part if self.running is not None else next(iter(self.parts), None)
        return Hold(
            operation=type(session or (part.operation if part is not None else None)).__name__,
            phase="draining" if not self.barrier_passed else "working" if working else "open",
            held_s=max(0.0, now - self.since),
            update_id=session.update_id if session is not None else None,
            ends_in_s=max(0.0, self.deadline - now) if math.isfinite(self.deadline) else None,
        )

    def extend(self, now: float) -> None:
        """Count the time until the next part from ``now``."""
        if self.session is not None:
            self.deadline = min(now + self.session.timeout_s, self.ceiling)

    def written(self, update: Update, reports: Iterable[Report]) -> None:
        """Replicas have written a part."""
        self.writes.add(update.source, reports)
        self.weight_version = self.weight_version or update.weight_version

    def saved(self, part: Save, reports: Iterable[Report]) -> None:
        """Replicas have saved a part of an adapter, with those before."""
        self.weight_version, adapter = self.weight_version or part.version, part.adapter
        self.adapters[adapter.nickname] = adapter
        self.unpaired[adapter.nickname] = [name for report in reports for name in report.waiting]

    def adapters_change(self) -> SetAdapters:
        """The change that makes the adapters active that came in parts."""
        return SetAdapters(
            nicknames=list(self.adapters),
            strengths=[1.0] * len(self.adapters),
            targets=[adapter.target for adapter in self.adapters.values()],
            mode="merge",
            sources=list(self.adapters.values()),
            keeps=True,
        )

    def refusal_of(self, source: Source) -> SafelightError | None:
        """Why ``source`` is not a part of the session: it has a module that the session was not begun for."""
        allowed = self.session.modules if self.session is not None else None
        others = [name for name in modules_of(source) if allowed is not None and name not in allowed]
        if others:
            return InvalidRequest(f"The update was not begun for {others[0]}.", field="target_modules")
        return None

    def refusal_to_end(self, commit: Commit) -> SafelightError | None:
        """Why its parts cannot be committed."""
        if not self.writes.counts and not self.adapters:
            return InvalidRequest("Nothing was written in this update; send tensors, or abort it.", field="update_id")
        if unpaired := [name for names in self.unpaired.values() for name in names]:
            return InvalidRequest(
                f"{len(unpaired)} factors have no counterpart ({', '.join(unpaired[:3])}); send them or abort.",
                field="update_id",
            )
        named = set(self.session.modules or () if self.session is not None else ())
        adapted = {adapter.target for adapter in self.adapters.values()}
        partly = sorted((named - adapted | set(self.writes.counts)) - self.writes.complete)
        if commit.require_complete and partly:
            return InvalidRequest(
                f"Not every tensor of {', '.join(partly)} was sent, and require_complete asks for that.",
                field="require_complete",
            )
        return None


def internal(operation: Operation, target: Replica) -> Transaction:
    """An operation for one replica, which no client asked for."""
    return Transaction("in_place", deque([Operate("", operation)]), target=target)
