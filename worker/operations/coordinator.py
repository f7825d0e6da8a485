"""What a rank does of an operation, and how the ranks of a replica agree that all of them did it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from torch import nn

from ...protocol.adapters import AdapterChange, SetAdapters
from ...protocol.errors import Conflict, ErrorInfo, Internal, InvalidRequest, NotFound, SafelightError
from ...protocol.operations import (
    CACHES,
    WEIGHTS,
    Adapt,
    CheckTensors,
    Digests,
    Export,
    Flush,
    Operation,
    Perform,
    Save,
    Sleep,
    Update,
    Wake,
)
from ...protocol.reports import Performed, Report
from ...protocol.tensor_sources import Broadcast, Source
from ..batcher import Batcher
from ..lora.adapters import MERGED, RankAdapters
from ..model import Model
from ..parallel.ranks import RankLost, Ranks
from ..sizes import DENOISERS
from ..weights.checkpoint.names import by_checkpoint_names
from ..weights.progress import Sign
from ..weights.snapshot.digests import module_digests, tensor_digests
from ..weights.snapshot.journal import Journal
from ..weights.snapshot.snapshot import export
from ..weights.transport.groups import Groups
from ..weights.transport.sources import Opened, Reader, Rejected, open_source
from ..weights.update.offload import Parking
from ..weights.update.rank_update import Update as RankUpdate
from ..weights.update.undo_log import UndoMemory
from .agreement import Given, describe, differences, differs_by_rank, fingerprint, is_for_each_rank

log = logging.getLogger(__name__)

PROMPT_CACHE = "prompt_embeddings"
"""The cache of what text encoders returned, as replies name it."""


class _Vote(msgspec.Struct, frozen=True):
    """What a rank has to say after a step."""

    report: Report = Report()
    error: ErrorInfo | None = None
    given: Given = {}
    """The tensors that it was given in this step."""


class Operations:
    """Performs operations on this rank. ``sign`` is called whenever a part of what takes long is done.

    ``place`` is the rank's number among ``places``, all ranks of all replicas; ``shared`` is the server's shared-memory
    directory.
    """

    def __init__(
        self,
        model: Model,
        batcher: Batcher,
        ranks: Ranks,
        *,
        place: int,
        places: int,
        shared: Path,
        journal: Journal | None,
        undo: UndoMemory,
        sign: Sign,
        adapters: RankAdapters,
        groups: Groups,
    ) -> None:
        self._model = model
        self._batcher = batcher
        self._ranks = ranks
        self._shared = shared
        self._sign = sign
        self._place = place
        self._places = places
        self._replica = place // ranks.size
        self._groups = groups
        self._journal = journal
        self._undo = undo
        self._update = RankUpdate(model.layouts, undo)
        self._adapters = adapters
        components = model.pipeline.components
        self._modules = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
        self._parking = Parking([*self._modules.values()], model.device, adapters.tensors)
        self._operation: Operation | None = None
        self._given: Given = {}

    @property
    def holds(self) -> bool:
        """Whether there are weights that are written and not committed, of which nothing may be computed."""
        return bool(self._update.written) or self._adapters.written

    def perform(self, order: Perform) -> Performed:
        """Do a step together with the other ranks; the answer is of all of them.

        What cannot be undone raises, and is the end of this process: its replica is started again.
        """
        if order.operation is not None:
            self._operation = order.operation
        if order.step in ("commit", "rollback", "release"):  # nothing in them may fail, or can be refused
            report = self._finish(order)
            self._operation = None
            self._ranks.exchange(b"")
            return Performed(order.number, order.step, report)
        votes = [msgspec.msgpack.decode(one, type=_Vote) for one in self._ranks.exchange(self._vote(order))]
        failed = next((vote for vote in votes if vote.error is not None), None)
        told = failed or _agreed(votes)
        return Performed(
            order.number, order.step, msgspec.structs.replace(told.report, ranks=self._ranks.size), told.error
        )

    def _vote(self, order: Perform) -> bytes:
        self._given = {}
        try:
            report = self._done(order)
            return msgspec.msgpack.encode(_Vote(report, given=self._given))
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

    def _done(self, order: Perform) -> Report:
        if order.step == "write":
            return self._write()
        if order.step == "journal":
            return self._write_down(order)
        return self._do(self._operation, order.leads)

    def _do(self, operation: Operation | None, leads: bool) -> Report:
        match operation:
            case Update():
                return self._prepare(operation, leads)
            case Digests():
                return self._digests(operation)
            case CheckTensors():
                return self._check(operation)
            case Flush():
                self._undo.free()
                return Report(invalidated=self._flush())
            case Sleep():
                return self._sleep(operation)
            case Wake():
                return self._wake(operation)
            case Export():
                return self._export(operation)
            case Save():
                return self._save(operation, leads)
            case Adapt():
                self._adapters.prepare(operation.change)
                return Report()
        raise Internal("There is no such operation.")

    def _reader(self, leads: bool) -> Reader:
        return Reader(self._ranks.rank, self._ranks.size, self._place, self._places, self._model.device, leads)

    def _save(self, operation: Save, leads: bool) -> Report:
        """One rank writes the file. Others read only what is for them alone, so that its sender has it back."""
        source = operation.source
        for_each = is_for_each_rank(source)
        writes = leads and self._ranks.rank == 0
        if not (writes or (leads and for_each) or isinstance(source, Broadcast)):
            return Report()
        reader = self._reader(leads)
        opened = self._received(source, reader) if isinstance(source, Broadcast) else self._opened(source, reader)
        try:
            if for_each:
                self._given = describe(opened.tensors, self._sign, hashed=differs_by_rank(source))
            if not writes:
                return Report()
            ((_, tensors),) = opened.tensors.items()
            return self._adapters.keep(operation, tensors)
        finally:
            opened.close()

    def _opened(self, source: Source, reader: Reader) -> Opened:
        return open_source(source, self._groups, reader, self._sign)

    def _received(self, source: Broadcast, reader: Reader) -> Opened:
        """Factors, whose shapes nothing says beforehand. What cannot be received ends the group."""
        try:
            self._groups.announced(source)
            return self._opened(source, reader)
        except SafelightError as failed:
            if not self._groups.leave(source.group):
                raise
            raise _and_closed(failed, source.group) from failed

    def _prepare(self, operation: Update, leads: bool) -> Report:
        source, reader = operation.source, self._reader(leads)
        if isinstance(source, Broadcast):
            return self._receive(source, reader)
        return self._prepare_from(source, reader, complete=operation.require_complete)

    def _prepare_from(self, source: Source, reader: Reader, *, complete: bool = False) -> Report:
        opened = open_source(source, self._groups, reader, self._sign)
        report = self._update.prepare(opened, self._sign, complete=complete)
        self._given = describe(opened.tensors, self._sign, hashed=differs_by_rank(source))
        return msgspec.structs.replace(report, given=fingerprint(self._given))

    def _receive(self, source: Broadcast, reader: Reader) -> Report:
        """What cannot be received, or is not to be, ends the group: who waits in it, the trainer too, is told at once.

        Nobody knows of what was announced and not received whether it is still sent, and would be taken for the next.
        """
        try:
            announced = {source.module: self._groups.announced(source)}
            self._update.check(by_checkpoint_names(announced, self._model.layouts).tensors)
            return self._prepare_from(source, reader)
        except (Rejected, SafelightError) as failed:
            if not self._groups.leave(source.group):
                raise
            raise _and_closed(failed, source.group) from failed

    def _let_go(self) -> None:
        """Of what another rank could not do. A group is left: it may be out of step, and the trainer wait in it."""
        self._update.release()
        match self._operation:
            case Adapt():
                self._adapters.release()
            case Update(source=Broadcast(group=group)) | Save(source=Broadcast(group=group)):
                self._groups.leave(group)

    def _write(self) -> Report:
        if isinstance(self._operation, Adapt):
            self._adapters.write()
        else:
            names = self._update.prepared
            self._update.write(self._sign)
            self._adapters.rebuild(names)
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        return self._update.report(part=True)

    def _write_down(self, order: Perform) -> Report:
        assert self._journal is not None
        assert order.weight_version is not None
        modules = list(self._update.written)
        try:
            self._journal.write(self._model.layouts, modules, order.weight_version, self._ranks, self._sign)
        except OSError as error:
            raise Internal(f"The journal could not be written: {error.strerror or error}.") from error
        return Report()

    def _finish(self, order: Perform) -> Report:
        if order.step == "release":
            self._let_go()
            return Report()
        if order.step == "rollback":
            if isinstance(self._operation, Adapt):
                self._adapters.rollback()
            undone = self._update.written
            self._update.rollback()
            self._adapters.rebuild(undone)
            if self._journal is not None:
                self._journal.drop()
            return Report()
        assert order.weight_version is not None, "a commit brings it"
        adapted = self._commit_adapters(self._operation.change) if isinstance(self._operation, Adapt) else None
        written = self._commit_update() if adapted is None or self._update.written else Report()
        self._model.weight_version = order.weight_version
        report = msgspec.structs.replace(written, weight_version=order.weight_version, ranks=self._ranks.size)
        return report if adapted is None else _both(report, adapted)

    def _commit_adapters(self, change: AdapterChange) -> Report:
        invalidated = self._flush() if self._adapters.commit() else []
        self._batcher.policy.adapters_changed()
        updated = self._adapters.layers_of(change.nicknames) if isinstance(change, SetAdapters) else {}
        state, told = self._adapters.state, self._adapters.told
        return Report(updated=updated, expected=updated, adapters=state, told=told, invalidated=invalidated)

    def _commit_update(self) -> Report:
        report = self._update.report()
        flushes = not isinstance(self._operation, Update) or self._operation.flush_cache
        encoders = set(self._update.written) - set(DENOISERS)
        rebuilt = [MERGED] if self._adapters.are_in(self._update.written) else []
        self._update.commit()
        if self._journal is not None:
            self._journal.commit()
        invalidated = [*(self._flush() if flushes or encoders else []), *rebuilt]
        return msgspec.structs.replace(report, invalidated=invalidated)

    def _digests(self, operation: Digests) -> Report:
        known = self._model.layouts
        names = list(known) if operation.modules is None else [name for name in operation.modules if name in known]
        layouts = {name: known[name] for name in names}
        told, tensors = module_digests(layouts, self._ranks, self._sign, detail=operation.detail)
        digests, *others = told
        for rank, other in enumerate(others, start=1):
            for module, digest in digests.items():
                if other[module] != digest:
                    raise Internal(f"Rank {rank} of replica {self._replica} has other weights in {module} than rank 0.")
        report = Report(digests=digests, tensors=tensors, weight_version=self._model.weight_version)
        if not operation.detail:
            return report
        return msgspec.structs.replace(
            report,
            aliases={name: dict(layout.names.aliases) for name, layout in layouts.items()},
            ignored={name: list(layout.names.ignored) for name, layout in layouts.items()},
        )

    def _check(self, operation: CheckTensors) -> Report:
        layout = self._model.layouts.get(operation.module)
        if layout is None:
            known = ", ".join(self._model.layouts)
            raise NotFound(f"The model has no module {operation.module!r}; it has {known}.", field="target_module")
        left_out = [name for name in operation.expected if name not in layout and layout.names.leaves_out(name)]
        there = {name: layout.names.aliases.get(name, name) for name in operation.expected if name not in left_out}
        missing = sorted(name for name, known in there.items() if known not in layout)
        known_names = sorted({known for known in there.values() if known in layout})
        found = tensor_digests(layout, known_names, self._sign)
        mismatched = sorted(
            name
            for name, known in there.items()
            if known in found and found[known].sha256 != operation.expected[name].lower()
        )
        report = Report(
            missing=missing, mismatched=mismatched, left_out=left_out, weight_version=self._model.weight_version
        )
        if not there:
            raise InvalidRequest(f"A checkpoint has none of these tensors ({', '.join(left_out[:3])}).")
        if missing or mismatched:
            raise Rejected(
                InvalidRequest(f"{len(missing)} tensors are missing, and {len(mismatched)} are not as expected."),
                report,
            )
        return report

    def _flush(self) -> list[str]:
        self._batcher.forget_answers()
        return [PROMPT_CACHE]

    def _sleep(self, operation: Sleep) -> Report:
        if modules := self._named_by(operation.tags):
            self._adapters.forget_stacks()
            try:
                self._parking.park(self._sign, modules)
            except OSError as error:
                raise Conflict(f"The weights cannot be put away: {error.strerror or error}.") from error
        if CACHES in operation.tags:
            self._undo.free()
            return Report(invalidated=self._flush())
        return Report()

    def _wake(self, operation: Wake) -> Report:
        if modules := self._named_by(operation.tags):
            self._parking.fetch(self._sign, modules)
        return Report()

    def _named_by(self, tags: list[str]) -> list[nn.Module]:
        return [module for name, module in self._modules.items() if WEIGHTS in tags or name in tags]

    def _export(self, operation: Export) -> Report:
        folder = self._shared / operation.folder
        try:
            files = export(self._model.layouts, operation.modules, folder, self._ranks, self._sign)
        except OSError as error:
            raise Internal(f"The weights could not be written out: {error.strerror or error}.") from error
        return Report(files={module: [file.path] for module, file in files.items()})


def _agreed(votes: list[_Vote]) -> _Vote:
    """What the ranks say that could all do it; an error where they were given different tensors."""
    if not (faults := differences([vote.given for vote in votes])):
        return votes[0]
    first = faults[0]
    error = InvalidRequest(
        f"Nothing was written: the ranks were given different tensors ({first.name}: {first.reason}). Every rank needs "
        "the same full tensors; one payload can serve all ranks."
    )
    return _Vote(Report(expected=votes[0].report.expected, invalid=faults), error.info())


def _both(written: Report, adapted: Report) -> Report:
    """Of a commit, what was written and which adapters there are now."""

    def added(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
        return {module: one.get(module, 0) + other.get(module, 0) for module in {**one, **other}}

    return msgspec.structs.replace(
        written,
        updated=added(written.updated, adapted.updated),
        expected=added(written.expected, adapted.expected),
        adapters=adapted.adapters,
        told=adapted.told,
        invalidated=list(dict.fromkeys([*written.invalidated, *adapted.invalidated])),
    )


def _and_closed(failed: Rejected | SafelightError, group: str) -> Rejected | SafelightError:
    error = failed.error if isinstance(failed, Rejected) else failed
    told = type(error)(f"{error.message} The group {group!r} is closed; make it again.", field=error.field)
    return Rejected(told, failed.report) if isinstance(failed, Rejected) else told
