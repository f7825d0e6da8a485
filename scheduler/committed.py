"""What was committed, and which replicas have it: who may serve, and what the others are to be given, by whom.

It decides, and tells replicas what they wait for. Operations have it done, in their line.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from ..protocol.adapters import AdapterChange, AdapterState, RestoreAdapters, SetAdapters
from ..protocol.errors import Conflict
from ..protocol.reports import Report
from ..protocol.tensor_sources import Files
from .on_disk import OnDisk
from .replicas import Replica, Replicas


@dataclass(frozen=True, slots=True)
class Turns:
    """Replicas whose turn has come: some have all from now on, and others are now to be brought up."""

    to_serve: list[Replica] = field(default_factory=list)
    to_bring_up: list[Replica] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of ``modules``, which the replica ``giver`` has, or which nobody has any more."""

    modules: list[str]
    giver: int | None


class Committed:
    """Owns what is committed, and what each replica has and lacks of it."""

    def __init__(self, replicas: Replicas, *, journal: bool, first_adapters: SetAdapters | None = None) -> None:
        self.version: str | None = None
        """``None`` before a replica has loaded."""
        self.base_version: str | None = None
        """The version that weights had last, without adapters that came as tensors."""
        self.adapters = AdapterState()
        self.journal = journal
        """Whether replicas write down what is to be committed, and read it when they start."""
        self.on_disk = OnDisk()
        """Where changed modules can be read again."""
        self._first_adapters = first_adapters
        self._replicas = replicas
        self._changed: set[str] = set()  # modules that are not as the checkpoint has them
        self._behind: set[int] = set()  # replicas that wait to be brought to the committed version
        self._bare: set[int] = set()  # those of them that lack nothing but adapters
        self._recent: dict[str, None] = {}  # adapters, the one that was not used for longest first
        self._lost: set[str] = set()  # changed modules that no replica has any more
        self._in_doubt: dict[str, set[str]] = {}  # what all replicas were lost with while they committed it: modules
        self._commits = 0
        self._published = 0  # versions that were made of adapters
        self._gone: dict[int, int] = {}  # how many commits there were when a replica's last process was lost

    @property
    def next_version(self) -> str:
        """What the next commit is called, unless its sender has a name for it."""
        current = self.version or ""
        return str(int(current) + 1) if current.isdecimal() else str(self._commits + self._published + 1)

    # Replicas come and go.

    def came(self, replica: Replica, *, changing: bool) -> Turns:
        """A replica has loaded its model. Unless it is as the others are and will be, it is not ready yet.

        ``changing`` says that the others may be different soon.
        """
        assert replica.model is not None, "it has just said what it serves"
        self._settle_doubt(replica, replica.model.weight_version)
        if self._has_all(replica) and self._adapters_to_be is None and not changing:
            return self.completed(replica)
        if self._lost:
            self._lost = set(self._changed)  # also what was sent again since: this one has nothing of it
        self._behind.add(replica.number)
        replica.wait_for(f"is to be brought to the weights of version {self.version}")
        return Turns(to_bring_up=[replica])

    def _settle_doubt(self, replica: Replica, version: str) -> None:
        """A replica comes with ``version``: take it up if it is the first, or all were lost in its commit.

        Unless another has weights without that commit by now: then it is to be undone in this one.
        """
        if self.journal and version in self._in_doubt:
            self._changed |= self._in_doubt.pop(version)
            if not any(self._has_weights(other) for other in self._replicas if other is not replica):
                self.version = self.base_version = version
        if self.version is None:
            self.version = self.base_version = version

    def completed(self, replica: Replica) -> Turns:
        """A replica has all that was committed, and can give it to those that wait for it."""
        self._behind.discard(replica.number)
        self._bare.discard(replica.number)
        replica.waits_no_longer()
        was_lost, self._lost = bool(self._lost), set()
        return Turns([replica], self._late() if was_lost else [])

    def gone(self, replica: Replica) -> None:
        """A replica's process is gone, and what it had; or it has failed, and is to be ended."""
        self._behind.discard(replica.number)
        self._bare.discard(replica.number)
        self._gone[replica.number] = self._commits
        if self._changed and not any(self.serves(other) for other in self._replicas if other is not replica):
            self._lost = set(self._changed)

    # Who has what.

    def serves(self, replica: Replica) -> bool:
        """Whether it has all that was committed, and was found to."""
        return replica.state in ("ready", "stalled") and not self.is_behind(replica.number)

    def is_behind(self, number: int) -> bool:
        """Whether a replica has loaded, and waits to be brought to the committed version."""
        return number in self._behind

    def lacks(self, replica: Replica) -> Weights | Files | AdapterChange | None:
        """What a replica that is behind is to be given next, if anything."""
        if replica.number in self._bare or self._has_all(replica):
            self._bare.add(replica.number)
            return self._adapters_to_be
        giver = self._giver()
        # a journal may be behind, and then a replica does not begin as the checkpoint is
        if giver is None and not self.journal and (files := self.on_disk.files(sorted(self._changed))) is not None:
            return files
        return Weights(sorted(self._changed), giver)

    def _giver(self) -> int | None:
        """A replica that has the committed weights, rather one that gives signs of life."""
        having = [replica for replica in self._replicas if self._has_weights(replica)]
        first = min(having, key=lambda replica: (replica.state != "ready", replica.number), default=None)
        return None if first is None else first.number

    def wait_for_lost(self, replica: Replica) -> None:
        """A replica can be given its weights by nobody: they are to be sent again."""
        self._lost = set(self._changed)
        self._say_what_is_lost(replica)

    def _say_what_is_lost(self, replica: Replica) -> None:
        replica.wait_for(
            f"the weights of version {self.version} were lost with the last process that had them: "
            f"update {', '.join(sorted(self._lost))} again, or restart the server"
        )

    def participants(self, *, to_update: bool) -> set[int]:
        """Those that have what was committed; where none does, those that came without, so that it can be sent again.

        One that is silent for now may serve again, so that it is not left out. Where some lack nothing but adapters,
        an update is for these, and the others get it from them.
        """
        having = {replica.number for replica in self._replicas if self.serves(replica)}
        bare = {number for number in self._behind if to_update and self._have_weights([number])}
        if to_update and not having and not bare and not self._lost:  # who had all could not be given its adapters
            self._lost = set(self._changed)
        return having or bare or set(self._behind)

    @property
    def sleepers(self) -> set[int]:
        """Those that may sleep: also one that waits, which was put to sleep while none had what was committed."""
        return {replica.number for replica in self._replicas if self.serves(replica)} | self._behind

    def refusal_of(self, partly: set[str], complete: set[str], numbers: Container[int]) -> Conflict | None:
        """Why what was written cannot replace what was lost, if none of these replicas has it.

        No module is made of half of it. A journal is not to have some of the lost modules as they were before: whoever
        read it would be known by its version as one that has everything.
        """
        together = self._lost if self.journal else self._lost & partly
        if together - complete and not self._have_weights(numbers):
            names = ", ".join(sorted(together))
            return Conflict(f"The weights of version {self.version} were lost; send every tensor of {names} at once.")
        return None

    def _late(self) -> list[Replica]:
        return [replica for replica in self._replicas if self.is_behind(replica.number)]

    @property
    def _adapters_to_be(self) -> AdapterChange | None:
        """By which a replica that has loaded gets the adapters that the others have, or that all begin with.

        None may be left in a version that was published with some.
        """
        if self.adapters.loaded or self.version != self.base_version:
            return RestoreAdapters(self.adapters)
        return self._first_adapters

    def _has_all(self, replica: Replica) -> bool:
        """Whether what a replica came with is what was committed: without updates the checkpoint, else the journal.

        What was committed while it started may have the name of what the journal had before.
        """
        if not self._changed:
            return not self.journal or self._is_named(replica)
        return self.journal and self._is_named(replica) and self._gone.get(replica.number, 0) == self._commits

    def _is_named(self, replica: Replica) -> bool:
        return replica.model is not None and replica.model.weight_version == self.base_version

    def _have_weights(self, numbers: Container[int]) -> bool:
        return any(self._has_weights(replica) for replica in self._replicas if replica.number in numbers)

    def _has_weights(self, replica: Replica) -> bool:
        """Whether it has the committed weights; it may wait for adapters, or for its turn to be found complete."""
        waits = self.is_behind(replica.number) and replica.state == "starting"
        return self.serves(replica) or (waits and (replica.number in self._bare or self._has_all(replica)))

    # Something is committed.

    def updated(self, reports: Mapping[int, Report], written: Iterable[str], complete: set[str]) -> Turns:
        """Replicas have committed an update of the modules ``written``; every tensor came of those in ``complete``."""
        still_lost = set() if self._have_weights(reports) else self._lost - complete
        for report in reports.values():
            if report.weight_version is not None:
                self.version = self.base_version = report.weight_version
        self._commits += 1
        self._bare.clear()
        self._in_doubt.clear()
        self._changed.update(written)
        if still_lost and any(replica.number not in reports for replica in self._late()):
            still_lost = set(self._changed)  # also what was sent now: who came meanwhile has nothing of it
        return self._have_written(reports, still_lost)

    def given(self, reports: Mapping[int, Report]) -> Turns:
        """A replica has committed the weights that another gave it."""
        return self._have_written(reports, still_lost=set())

    def _have_written(self, reports: Mapping[int, Report], still_lost: set[str]) -> Turns:
        """Replicas have what they wrote; those that waited have all weights now, unless some are ``still_lost``."""
        for number, report in reports.items():
            if (replica := self._replicas.get(number)) is not None and report.weight_version is not None:
                replica.has_version(report.weight_version)
        were_lost, self._lost = bool(self._lost), still_lost
        if still_lost:
            for replica in self._late():
                self._say_what_is_lost(replica)
            return Turns()
        came_up = [replica for replica in self._late() if replica.number in reports]
        if self._adapters_to_be is not None:
            self._bare.update(replica.number for replica in came_up)
            return Turns([], came_up + (self._late() if were_lost else []))
        for replica in came_up:
            self.completed(replica)
        return Turns(came_up, self._late() if were_lost else [])

    def adapted(self, adapters: AdapterState, version: str, numbers: Iterable[int]) -> None:
        """Replicas have committed other adapters, maybe as another version."""
        self.adapters, self._first_adapters = adapters, None
        self._published += self.version != version
        self.version = version
        for number in numbers:
            if (replica := self._replicas.get(number)) is not None:
                replica.has_version(version)

    def used(self, adapters: Iterable[str]) -> None:
        """A request names these."""
        for name in adapters:
            if name in self.adapters.loaded:
                self._recent.pop(name, None)
                self._recent[name] = None

    def recent(self) -> list[str]:
        """The committed adapters that were used, the one that was not for longest first."""
        self._recent = {name: None for name in self._recent if name in self.adapters.loaded}
        return list(self._recent)

    def lost_in_commit(self, version: str, written: Iterable[str]) -> None:
        """All replicas were lost while they committed ``version``: those that come next know whether it is."""
        self._in_doubt = {version: set(written)}
