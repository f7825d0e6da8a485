"""The steps that every participant takes an operation through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ...protocol.operations import Operation
from ...protocol.reports import Report
from .agreement import Manifest

OperationT = TypeVar("OperationT", bound=Operation, contravariant=True)


@dataclass(frozen=True, slots=True)
class Prepared:
    """The result of *prepare*: a report, and the tensors that the ranks must have received alike."""

    report: Report = field(default_factory=Report)
    manifest: Manifest = field(default_factory=dict)


class Participant(Protocol[OperationT]):
    """This rank's part in operations of one kind. The coordinator calls it on every rank in the same order.

    *prepare* and *write* may raise; then the other ranks' work is released or rolled back too. The steps after them
    must not fail.
    """

    @property
    def holds(self) -> bool:
        """True if something is written and not committed, so that no forward may run."""
        ...

    def prepare(self, operation: OperationT, *, is_primary: bool) -> Prepared:
        """Check everything that can fail, and write nothing. Read-only operations do all their work here."""
        ...

    def write(self) -> Report:
        """Write what was prepared; it can still be rolled back."""
        ...

    def commit(self) -> Report:
        """Keep what was written."""
        ...

    def rollback(self) -> None:
        """Put back what was written, if anything."""
        ...

    def release(self) -> None:
        """Drop the prepared part, as another rank or replica could not prepare its own."""
        ...


Table = Mapping[type[Operation], Participant[Any]]
"""The participant for each kind of operation. They commit in this order, and roll back in reverse."""


class OneStep:
    """The steps that a participant does not have that has finished after *prepare*."""

    holds = False

    def write(self) -> Report:
        raise AssertionError("the operation has one step")

    def commit(self) -> Report:
        raise AssertionError("the operation has one step")

    def rollback(self) -> None:
        pass

    def release(self) -> None:
        pass
