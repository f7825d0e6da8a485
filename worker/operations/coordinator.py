"""Takes this rank through the steps of an operation, and has the ranks of a replica agree on each."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
import torch

from ...protocol.errors import ErrorInfo, Internal, InvalidRequest, SafelightError
from ...protocol.operations import Operation, Perform
from ...protocol.reports import Performed, Report
from ..model.model import Model
from ..parallel.ranks import RankLost, Ranks
from ..weights.transport.sources import Rejected
from .agreement import Manifest, differences
from .journal_step import JournalStep
from .participant import Participant, Prepared, Table

log = logging.getLogger(__name__)


class _Vote(msgspec.Struct, frozen=True):
    """A rank's answer to a step; ``manifest`` describes the tensors that it received in it."""

    report: Report = Report()
    error: ErrorInfo | None = None
    manifest: Manifest = {}


class Coordinator:
    """Performs operations on this rank, step by step, in lockstep with the other ranks.

    *prepare*, *write* and *journal* are voted on. *commit*, *rollback* and *release* cannot fail or be refused: what
    they raise ends this process, and its replica starts again.
    """

    def __init__(self, model: Model, ranks: Ranks, table: Table, journal: JournalStep) -> None:
        self._model = model
        self._ranks = ranks
        self._table = table
        self._participants = list(table.values())
        self._journal = journal
        self._operation: Operation | None = None

    @property
    def holds(self) -> bool:
        """True if something is written and not committed, so that no forward may run."""
        return any(one.holds for one in self._participants)

    def perform(self, order: Perform) -> Performed:
        """Do a step together with the other ranks; the answer is that of all of them."""
        if order.operation is not None:
            self._operation = order.operation
        if order.step in ("commit", "rollback", "release"):
            report = self._finish(order)
            self._operation = None
            self._ranks.all_gather_bytes(b"")
            return Performed(order.number, order.step, report)
        votes = [msgspec.msgpack.decode(one, type=_Vote) for one in self._ranks.all_gather_bytes(self._vote(order))]
        failed = next((vote for vote in votes if vote.error is not None), None)
        outcome = failed or _agreed(votes)
        report = msgspec.structs.replace(outcome.report, ranks=self._ranks.size)
        return Performed(order.number, order.step, report, outcome.error)

    def _vote(self, order: Perform) -> bytes:
        try:
            prepared = self._do(order)
            vote = _Vote(prepared.report, manifest=prepared.manifest)
        except Rejected as rejected:
            vote = _Vote(rejected.report, rejected.error.info())
        except SafelightError as error:
            vote = _Vote(error=error.info())
        except (RankLost, torch.AcceleratorError):
            raise
        except Exception:
            log.exception("an operation failed")
            vote = _Vote(error=Internal("The operation failed; the server's log has the details.").info())
        return msgspec.msgpack.encode(vote)

    def _do(self, order: Perform) -> Prepared:
        if order.step == "journal":
            assert order.weight_version is not None, "the journal brings it"
            self._journal.write(order.weight_version)
            return Prepared()
        participant = self._participant
        if participant is None:
            raise Internal("There is no such operation.")
        if order.step == "write":
            report = participant.write()
            if self._model.device.type == "cuda":
                torch.cuda.synchronize(self._model.device)
            return Prepared(report)
        return participant.prepare(self._operation, is_primary=order.is_primary)

    @property
    def _participant(self) -> Participant[Any] | None:
        """The participant of the current operation."""
        return None if self._operation is None else self._table.get(type(self._operation))

    def _finish(self, order: Perform) -> Report:
        match order.step:
            case "release":
                if self._participant is not None:
                    self._participant.release()
            case "rollback":
                for participant in reversed(self._participants):
                    participant.rollback()
                self._journal.drop()
            case "commit":
                assert order.weight_version is not None, "a commit brings it"
                return self._commit(order.weight_version)
        return Report()

    def _commit(self, version: str) -> Report:
        report = Report()
        for participant in self._participants:
            if participant.holds:
                report = _both(report, participant.commit())
        self._journal.commit()
        self._model.weight_version = version
        return msgspec.structs.replace(report, weight_version=version, ranks=self._ranks.size)


def _agreed(votes: list[_Vote]) -> _Vote:
    """The first rank's vote where all ranks received the same tensors, else an error."""
    if not (faults := differences([vote.manifest for vote in votes])):
        return votes[0]
    first = faults[0]
    error = InvalidRequest(
        f"Nothing was written: the ranks were given different tensors ({first.name}: {first.reason}). Every rank needs "
        "the same full tensors; one payload can serve all ranks."
    )
    return _Vote(Report(expected=votes[0].report.expected, invalid=faults), error.info())


def _both(one: Report, other: Report) -> Report:
    """The reports of two participants of a commit as one."""

    def added(ours: Mapping[str, int], theirs: Mapping[str, int]) -> dict[str, int]:
        return {module: ours.get(module, 0) + theirs.get(module, 0) for module in {**ours, **theirs}}

    return msgspec.structs.replace(
        one,
        updated=added(one.updated, other.updated),
        expected=added(one.expected, other.expected),
        complete=[*one.complete, *other.complete],
        left_out=[*one.left_out, *other.left_out],
        adapters=other.adapters or one.adapters,
        notes=[*one.notes, *other.notes],
        invalidated=list(dict.fromkeys([*one.invalidated, *other.invalidated])),
    )
