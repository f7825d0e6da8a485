"""The step *journal*: what an update has written, on disk before it is committed."""

from __future__ import annotations

from ...protocol.errors import Internal
from ..weights.update.rank_update import RankUpdate
from .resources import Resources


class JournalStep:
    """Writes, commits or drops an entry of this rank's journal, if there is one."""

    def __init__(self, resources: Resources, update: RankUpdate) -> None:
        self._resources = resources
        self._journal = resources.journal
        self._update = update

    def write(self, version: str) -> None:
        """Raises ``Internal`` where the disk refuses it."""
        assert self._journal is not None, "the scheduler knows who keeps a journal"
        rank, modules = self._resources, list(self._update.written)
        try:
            self._journal.write(rank.model.layouts, modules, version, rank.ranks, rank.on_progress)
        except OSError as error:
            raise Internal(f"The journal could not be written: {error.strerror or error}.") from error

    def commit(self) -> None:
        if self._journal is not None:
            self._journal.commit()

    def drop(self) -> None:
        if self._journal is not None:
            self._journal.drop()
