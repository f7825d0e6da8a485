"""Tracks what each replica holds of the committed state, what a stale one must receive, and from which donor.

A replica that has loaded *joined*. It is *stale* until it is *caught up*, which lets it serve, and it *left* when its
process is gone. All else is derived from the weights and adapters that it holds.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace

from ..protocol.adapters import AdapterChange, AdapterState
from ..protocol.errors import Conflict
from ..protocol.tensor_sources import Files
from .committed import AS_LOADED, UNKNOWN, CommittedState, Weights
from .replicas import Replica, Replicas
from .writes import Writes


@dataclass(frozen=True, slots=True)
class Holding:
    """The weights that a replica has, and the adapters: ``None`` before it was given any."""

    weights: Weights
    adapters: AdapterState | None = None


@dataclass(frozen=True, slots=True)
class UndecidedCommit:
    """A commit that every replica was lost in. With a journal, the next replica to join knows whether it was made."""

    version: str
    write: int
    modules: frozenset[str]


class ReplicaSync:
    """Owns the committed state, and what each replica holds of it."""

    def __init__(self, replicas: Replicas, committed: CommittedState, *, journal: bool) -> None:
        self.committed = committed
        self.asleep: set[str] = set()
        """The tags that replicas were put to sleep with."""
        self.journal = journal
        """Replicas write each update to a journal before its commit, and read it when they start."""
        self._replicas = replicas
        self._holdings: dict[int, Holding] = {}  # of the replicas that joined
        self._left_after: dict[int, int] = {}  # the number of updates when a replica's last process was lost
        self._undecided: UndecidedCommit | None = None

    # Replicas join, are caught up, and leave.

    def joined(self, replica: Replica) -> None:
        """A replica has loaded its model."""
        assert replica.model is not None, "it has just said what it serves"
        version = replica.model.weight_version
        if self.committed.version is None:
            self.committed = self.committed.based_on(version)
        self._holdings[replica.number] = Holding(self._loaded_weights(replica.number, version))

    def wait(self, replica: Replica) -> None:
        """A replica that joined is stale until it is caught up."""
        replica.wait_for(f"waits for the weights of version {self.committed.version}")

    def _loaded_weights(self, number: int, version: str) -> Weights:
        """Without a journal those of the checkpoint; with one, its version tells.

        A version that was committed while a replica started may have the name of one that the journal had before.
        """
        if not self.journal:
            return {}
        undecided = self._undecided
        if undecided is not None and version == undecided.version:
            return self._decide(undecided)
        committed = self.committed
        if version == committed.base_version and self._left_after.get(number, 0) == committed.updates:
            return committed.weights
        return dict.fromkeys(committed.modules, UNKNOWN)

    def _decide(self, undecided: UndecidedCommit) -> Weights:
        """A replica has found the undecided commit in the journal: it counts, unless others have weights without it."""
        found = {**self.committed.weights, **dict.fromkeys(undecided.modules, undecided.write)}
        self._undecided = None
        if self.donor() is None:
            self.committed = self.committed.taken_up(undecided.version, undecided.write, undecided.modules)
        return found

    def caught_up(self, replica: Replica) -> None:
        """A replica has the committed state, and serves it from now on."""
        self._undecided = None  # it serves without that commit
        replica.waits_no_longer()

    def left(self, replica: Replica) -> None:
        """A replica's process is gone, and what it had; or it has failed, and will be ended."""
        self._holdings.pop(replica.number, None)
        self._left_after[replica.number] = self.committed.updates

    # Which replica has what.

    def serves(self, replica: Replica) -> bool:
        return replica.number in self._holdings and replica.state in ("ready", "stalled")

    def is_stale(self, replica: Replica) -> bool:
        return replica.number in self._holdings and replica.state == "starting"

    def stale(self) -> list[Replica]:
        return [replica for replica in self._replicas if self.is_stale(replica)]

    def orphaned_modules(self, numbers: Iterable[int]) -> set[str]:
        """The modules that one of these replicas does not have as they were committed."""
        return {module for number in numbers for module in self._missing(self._holdings[number].weights)}

    def _missing(self, weights: Weights) -> list[str]:
        committed = self.committed.weights
        return sorted(module for module in committed if weights.get(module, AS_LOADED) != committed[module])

    def missing_modules(self, replica: Replica) -> list[str]:
        return self._missing(self._holdings[replica.number].weights)

    def missing_adapters(self, replica: Replica) -> AdapterChange | None:
        """The change that gives ``replica`` the committed adapters; ``None`` where it has them."""
        if self._holdings[replica.number].adapters == self.committed.adapters:
            return None
        return self.committed.restoring_change

    def is_complete(self, replica: Replica) -> bool:
        return not self.missing_modules(replica) and self.missing_adapters(replica) is None

    def donor(self) -> Replica | None:
        """A replica that has the committed weights, rather one whose heartbeats come."""
        having = [replica for replica in self._replicas if self._has_weights(replica)]
        return min(having, key=lambda replica: (replica.state != "ready", replica.number), default=None)

    def _has_weights(self, replica: Replica) -> bool:
        return (self.serves(replica) or self.is_stale(replica)) and not self.missing_modules(replica)

    def files(self, modules: Sequence[str]) -> Files | None:
        """The files on disk that ``modules`` can be read from again.

        A journal may have missed an update, and then a replica does not begin as the checkpoint is.
        """
        return None if self.journal else self.committed.files(modules)

    def report_orphaned(self, replica: Replica) -> None:
        """Say that what ``replica`` lacks has to be sent again."""
        replica.wait_for(
            f"the weights of version {self.committed.version} were lost with the last process that had them: "
            f"update {', '.join(self.missing_modules(replica))} again, or restart the server"
        )

    def participants(self, *, to_update: bool) -> set[int]:
        """The replicas that serve, also one that is silent for now; where none does, stale ones, so that lost weights
        can be sent again.

        Where some of these need adapters only, an update is for them, and the others get it from them.
        """
        serving = {replica.number for replica in self._replicas if self.serves(replica)}
        stale = self.stale()
        needs_adapters_only = {replica.number for replica in stale if to_update and self._has_weights(replica)}
        return serving or needs_adapters_only or {replica.number for replica in stale}

    @property
    def sleepers(self) -> set[int]:
        """The replicas that may sleep; stale ones were put to sleep where none served."""
        return {replica.number for replica in self._replicas if self.serves(replica) or self.is_stale(replica)}

    def refusal_of(self, writes: Writes, numbers: Container[int]) -> Conflict | None:
        """Why an update of these replicas cannot be committed while they lack other weights.

        A module is never made of half of it. A journal must not have some of the lost modules as they were before: its
        reader would be known by its version as one that has everything.
        """
        orphaned = self.orphaned_modules(number for number in self._holdings if number in numbers)
        together = orphaned if self.journal else orphaned & writes.partly
        if together - writes.complete:
            names = ", ".join(sorted(together))
            return Conflict(
                f"The weights of version {self.committed.version} were lost; send every tensor of {names} at once."
            )
        return None

    # Something is committed.

    def updated(self, version: str, numbers: Iterable[int], writes: Writes) -> None:
        """These replicas have committed an update."""
        self.committed = self.committed.updated(version, writes)
        self._undecided = None
        written = dict.fromkeys(writes.counts, self.committed.writes)
        for number in numbers:
            holding = self._holdings[number]
            self._now_holds(number, replace(holding, weights={**holding.weights, **written}), version)

    def received(self, number: int) -> None:
        """A replica has committed the weights that it lacked."""
        assert self.committed.base_version is not None
        holding = replace(self._holdings[number], weights=self.committed.weights)
        self._now_holds(number, holding, self.committed.base_version)

    def adapted(self, adapters: AdapterState, version: str, numbers: Iterable[int]) -> None:
        """These replicas have committed other adapters, maybe as another version."""
        self.committed = self.committed.adapted(adapters, version)
        for number in numbers:
            self._now_holds(number, replace(self._holdings[number], adapters=adapters), version)

    def _now_holds(self, number: int, holding: Holding, version: str) -> None:
        self._holdings[number] = holding
        if (replica := self._replicas.get(number)) is not None:
            replica.has_version(version)

    def undecided(self, version: str, modules: Iterable[str]) -> None:
        """Every replica was lost while it committed ``version``."""
        modules = frozenset(modules)
        self.committed = self.committed.tried(modules)
        self._undecided = UndecidedCommit(version, self.committed.writes, modules)

    def forget_files(self) -> None:
        """Files on disk are not there any more, or not what they were."""
        self.committed = self.committed.without_files()
