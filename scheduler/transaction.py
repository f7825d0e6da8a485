"""What holds back everything behind it: one operation, or a begun update with its parts."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec.structs import replace

from ..protocol.adapters import AdapterSource, SetAdapters
from ..protocol.errors import InvalidRequest, SafelightError, Unavailable, from_info
from ..protocol.operations import Barrier, Begin, Commit, Operate, Operation, Perform, Step
from ..protocol.reports import Performed, Report
from ..protocol.tensor_sources import Source
from .on_disk import Origins, modules_of
from .replicas import Replica

RETRY_S = 5.0
"""When it is worth asking again after a replica was lost: it comes back in seconds."""


@dataclass(slots=True, eq=False)
class Running:
    """A part that ``replicas`` work on: which step, who has yet to answer it, and what the others said of it.

    Who is lost is in none of them any more. ``version`` is the one that is to be committed.
    """

    part: Operate
    number: int
    replicas: set[int]
    step: Step = "prepare"
    expected: set[int] = field(default_factory=set)
    reports: dict[int, Report] = field(default_factory=dict)
    error: SafelightError | None = None
    failed: Report | None = None
    version: str = ""

    def begin(self, step: Step, operation: Operation | None = None) -> list[tuple[int, Perform]]:
        """Expect ``step`` of all; the journal is kept by one of them. Returns the orders, with whom they are for."""
        first, version = min(self.replicas), self.version or None
        self.step, self.expected = step, {first} if step == "journal" else set(self.replicas)
        self.reports.clear()
        order = Perform(number=self.number, step=step, leads=False, operation=operation, weight_version=version)
        return [(number, replace(order, leads=number == first)) for number in sorted(self.expected)]

    def takes(self, replica: int, message: Performed) -> bool:
        """What a replica says, if it is of this step, and not the last words of a process that is gone."""
        if (message.number, message.step) != (self.number, self.step) or replica not in self.expected:
            return False
        self.expected.remove(replica)
        self.reports[replica] = message.report
        if message.error is not None and (self.error is None or replica == min(self.reports)):
            self.error, self.failed = from_info(message.error), message.report
        return True

    def compare(self) -> None:
        """Fail a step in which replicas were given different tensors."""
        first = min(self.reports, default=0)
        others = [number for number, report in self.reports.items() if report.given != self.reports[first].given]
        if others and self.error is None:
            self.error = InvalidRequest(
                f"Nothing was written: replica {min(others)} was given other tensors than replica {first}. "
                "Every rank of every replica needs the same full tensors."
            )

    def goes_on_without(self, replica: int) -> None:
        """What is to be undone or committed is so by the others; whoever keeps the journal, or votes, is missed."""
        missed = replica in self.expected if self.step == "journal" else self.step not in ("commit", "rollback")
        if missed and self.error is None:
            self.error = Unavailable(
                f"Replica {replica} was lost; on the others everything is as it was.", retry_after_s=RETRY_S
            )
        self.replicas.discard(replica)
        self.expected.discard(replica)
        self.reports.pop(replica, None)


@dataclass(slots=True, eq=False)
class Transaction:
    """What holds back everything behind it: one operation, or a begun update with its parts.

    ``replicas`` are those that take part, once it has begun; ``only`` is the one that an operation of our own is for.
    ``written`` counts the tensors of each module that parts have written, and ``complete`` are modules of which every
    tensor came. ``adapters`` are those that came in parts, with what is ``waiting`` for its counterpart, by nickname.
    ``origins`` say where parts came from, in their order.
    """

    barrier: Barrier
    parts: deque[Operate] = field(default_factory=deque)
    begun: Begin | None = None
    only: Replica | None = None
    reached: bool = False
    replicas: set[int] | None = None
    running: Running | None = None
    since: float = math.inf
    """When it began to hold back what is behind it."""
    deadline: float = math.inf
    ceiling: float = math.inf
    """When a begun update ends, however many parts of it come."""
    written: dict[str, int] = field(default_factory=dict)
    complete: set[str] = field(default_factory=set)
    adapters: dict[str, AdapterSource] = field(default_factory=dict)
    waiting: dict[str, list[str]] = field(default_factory=dict)
    origins: list[Origins] = field(default_factory=list)

    @property
    def partly(self) -> set[str]:
        """Modules of which tensors were written, but not all."""
        return set(self.written) - self.complete

    def gives_time(self, now: float) -> None:
        """Have the time until the next part count from ``now``."""
        if self.begun is not None:
            self.deadline = min(now + self.begun.timeout_s, self.ceiling)

    def took(self, report: Report) -> None:
        """A replica has written a part."""
        self.complete.update(report.complete)
        for module, count in report.updated.items():
            self.written[module] = max(self.written.get(module, 0), count)

    def kept(self, adapter: AdapterSource, reports: Iterable[Report]) -> None:
        """A replica has kept a part of an adapter, with those before."""
        self.adapters[adapter.nickname] = adapter
        self.waiting[adapter.nickname] = [name for report in reports for name in report.waiting]

    def adapters_change(self) -> SetAdapters:
        """How the adapters that came in parts become active."""
        return SetAdapters(
            nicknames=list(self.adapters),
            strengths=[1.0] * len(self.adapters),
            targets=[adapter.target for adapter in self.adapters.values()],
            mode="merge",
            sources=list(self.adapters.values()),
            keeps=True,
        )

    def refusal_of(self, source: Source) -> SafelightError | None:
        """Why ``source`` is no part of the update, if it names a module that the update was not begun for."""
        named = modules_of(source)
        meant = self.begun.modules if self.begun is not None else None
        others = [name for name in named if meant is not None and name not in meant]
        if others:
            return InvalidRequest(f"The update was not begun for {others[0]}.", field="target_modules")
        return None

    def refusal_to_end(self, commit: Commit) -> SafelightError | None:
        """Why it cannot be committed, as far as it knows."""
        if not self.written and not self.adapters:
            return InvalidRequest("Nothing was written in this update; send tensors, or abort it.", field="update_id")
        if waiting := [name for names in self.waiting.values() for name in names]:
            return InvalidRequest(
                f"{len(waiting)} factors have no counterpart ({', '.join(waiting[:3])}); send them or abort.",
                field="update_id",
            )
        named = set(self.begun.modules or () if self.begun is not None else ())
        adapted = {adapter.target for adapter in self.adapters.values()}
        partly = sorted((named - adapted | set(self.written)) - self.complete)
        if commit.require_complete and partly:
            return InvalidRequest(
                f"Not every tensor of {', '.join(partly)} was sent, and require_complete asks for that.",
                field="require_complete",
            )
        return None


def of_our_own(operation: Operation, only: Replica | None = None) -> Transaction:
    """An operation that nobody asked for, on all replicas or on one."""
    return Transaction("in_place", deque([Operate("", operation)]), only=only)
