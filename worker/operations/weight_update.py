"""Updates of weights."""

from __future__ import annotations

import msgspec

from ...protocol.operations import Update
from ...protocol.reports import Report
from ...protocol.tensor_sources import Broadcast, Source
from ..lora.rank_adapters import MERGED
from ..weights.checkpoint.aliases import by_checkpoint_names
from ..weights.update.checks import check_tensors
from ..weights.update.rank_update import RankUpdate
from .agreement import describe, differs_by_rank, fingerprint
from .broadcast import closing_on_failure
from .participant import Prepared
from .resources import Resources


class WeightUpdate:
    """Writes the parts of an update. Adapters that are merged into the written weights are merged anew."""

    def __init__(self, resources: Resources, update: RankUpdate) -> None:
        self._resources = resources
        self._update = update
        self._operation: Update | None = None

    @property
    def holds(self) -> bool:
        return bool(self._update.written)

    def prepare(self, operation: Update, *, is_primary: bool) -> Prepared:
        self._operation = operation
        source = operation.source
        if not isinstance(source, Broadcast):
            return self._prepare(source, is_primary=is_primary, complete=operation.require_complete)
        groups, layouts = self._resources.groups, self._resources.model.layouts
        with closing_on_failure(groups, source.group):
            announced = {source.module: groups.announced(source)}
            check_tensors(by_checkpoint_names(announced, layouts).tensors, layouts)
            return self._prepare(source, is_primary=is_primary, complete=False)

    def _prepare(self, source: Source, *, is_primary: bool, complete: bool) -> Prepared:
        opened = self._resources.open(source, is_primary=is_primary)
        report = self._update.prepare(opened, self._resources.on_progress, complete=complete)
        manifest = describe(opened.tensors, self._resources.on_progress, hashed=differs_by_rank(source))
        return Prepared(msgspec.structs.replace(report, given=fingerprint(manifest)), manifest)

    def write(self) -> Report:
        assert self._operation is not None, "prepared before"
        names = self._update.prepared
        self._update.write(self._resources.on_progress)
        self._resources.adapters.rebuild(names)
        return self._update.report(part=True)

    def commit(self) -> Report:
        report, written = self._update.report(), self._update.written
        merged = [MERGED] if self._resources.adapters.are_in(written) else []
        self._update.commit()
        return msgspec.structs.replace(report, invalidated=[*self._resources.changed(written), *merged])

    def rollback(self) -> None:
        written = self._update.written
        self._update.rollback()
        self._resources.adapters.rebuild(written)

    def release(self) -> None:
        """Drop the tensors. Leave the group: its members may be out of step, and the trainer waits in it."""
        self._update.release()
        if self._operation is not None and isinstance(self._operation.source, Broadcast):
            self._resources.groups.leave(self._operation.source.group)
