"""Snapshots of modules, which a replica that joins later reads."""

from __future__ import annotations

from ...protocol.errors import Internal
from ...protocol.operations import TakeSnapshot
from ...protocol.reports import Report
from ..weights.snapshot.snapshot import write_snapshot
from .participant import OneStep, Prepared
from .resources import Resources


class Snapshot(OneStep):
    def __init__(self, resources: Resources) -> None:
        self._resources = resources

    def prepare(self, operation: TakeSnapshot, *, is_primary: bool) -> Prepared:
        rank = self._resources
        folder = rank.shared / operation.folder
        try:
            files = write_snapshot(rank.model.layouts, operation.modules, folder, rank.ranks, rank.on_progress)
        except OSError as error:
            raise Internal(f"The weights could not be written out: {error.strerror or error}.") from error
        return Prepared(Report(files={module: [file.path] for module, file in files.items()}))
