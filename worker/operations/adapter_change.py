"""Changes of adapters, and the parts in which an adapter's tensors come."""

from __future__ import annotations

from ...protocol.adapters import AdapterChange, SetAdapters
from ...protocol.operations import Adapt, Save
from ...protocol.reports import Report
from ...protocol.tensor_sources import Broadcast
from ..weights.transport.sources import TensorSource
from .agreement import describe, differs_by_rank, is_for_each_rank
from .broadcast import closing_on_failure
from .participant import OneStep, Prepared
from .resources import Resources


class AdaptersChange:
    """Loads, sets, merges and unloads adapters."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._adapters = resources.adapters
        self._change: AdapterChange | None = None

    @property
    def holds(self) -> bool:
        return self._adapters.written

    def prepare(self, operation: Adapt, *, is_primary: bool) -> Prepared:
        self._change = operation.change
        self._adapters.prepare(operation.change)
        return Prepared()

    def write(self) -> Report:
        self._adapters.write()
        return Report()

    def commit(self) -> Report:
        invalidated = self._resources.changed(self._adapters.commit())
        self._resources.batcher.policy.adapters_changed()
        change = self._change
        updated = self._adapters.layers_of(change.nicknames) if isinstance(change, SetAdapters) else {}
        state, notes = self._adapters.state, self._adapters.notes
        return Report(updated=updated, expected=updated, adapters=state, notes=notes, invalidated=invalidated)

    def rollback(self) -> None:
        self._adapters.rollback()

    def release(self) -> None:
        self._adapters.release()


class AdapterPart(OneStep):
    """Keeps one part of an adapter's tensors in a file. One rank writes it.

    The other ranks read only what was sent for them alone, so that its sender gets its memory back.
    """

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._operation: Save | None = None

    def prepare(self, operation: Save, *, is_primary: bool) -> Prepared:
        self._operation = operation
        source = operation.source
        for_each = is_for_each_rank(source)
        writes = is_primary and self._resources.ranks.rank == 0
        if not (writes or (is_primary and for_each) or isinstance(source, Broadcast)):
            return Prepared()
        opened = self._open(operation, is_primary=is_primary)
        try:
            hashed, on_progress = differs_by_rank(source), self._resources.on_progress
            manifest = describe(opened.tensors, on_progress, hashed=hashed) if for_each else {}
            if not writes:
                return Prepared(manifest=manifest)
            ((_, tensors),) = opened.tensors.items()
            return Prepared(self._resources.adapters.keep(operation, tensors), manifest)
        finally:
            opened.close()

    def _open(self, operation: Save, *, is_primary: bool) -> TensorSource:
        source = operation.source
        if not isinstance(source, Broadcast):
            return self._resources.open(source, is_primary=is_primary)
        with closing_on_failure(self._resources.groups, source.group):
            self._resources.groups.announced(source)
            return self._resources.open(source, is_primary=is_primary)

    def release(self) -> None:
        """Leave the group: its members may be out of step, and the trainer waits in it."""
        if self._operation is not None and isinstance(self._operation.source, Broadcast):
            self._resources.groups.leave(self._operation.source.group)
