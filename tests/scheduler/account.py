"""A trainer's knowledge of weights and adapters, from replies alone, for comparison with the replicas."""

from dataclasses import dataclass, field
from typing import TypeAlias

from safelight.protocol.adapters import AdapterState, SetAdapters
from safelight.protocol.operations import (
    Abort,
    Adapt,
    Begin,
    Commit,
    ListAdapters,
    Operation,
    Perform,
    Sleep,
    Update,
    Wake,
)
from safelight.protocol.reports import Operated
from safelight.tests.scheduler.adapting import adapted
from safelight.tests.scheduler.operating import CHECKPOINT, Process

Weights: TypeAlias = dict[str, str]
Truth: TypeAlias = tuple[str, Weights, AdapterState]
"""A version, its weights, and the adapters that are used with them."""
Asked: TypeAlias = Operation | ListAdapters | None
"""``None`` stands for a pause or its end."""


@dataclass
class Begun:
    version: str
    parts: list[Update] = field(default_factory=list)


class Account:
    """``truths`` are what may be committed: more than one where all replicas were lost in a commit.

    ``journal`` is what the replicas have written down. ``serves`` says that a replica was ready, and before that they
    have yet to get the adapters that they begin with.
    """

    def __init__(self, first: SetAdapters | None = None) -> None:
        adapters = AdapterState() if first is None else adapted(AdapterState(), first)
        self.truths: list[Truth] = [("0", dict(CHECKPOINT), adapters)]
        self.versions = {"0"}
        self.serves = False
        self.journal: tuple[str, Weights] | None = None
        self.asleep: set[str] = set()
        self.begun: dict[str, Begun] = {}

    def is_done(self, operation: Asked, operated: Operated) -> None:
        match operation:
            case Adapt():
                self.adapt(operation, operated)
            case ListAdapters():
                reported = operated.adapters
                assert reported == self.adapters or (reported == AdapterState() and not self.serves)
            case Update(update_id=None):
                assert operation.weight_version is not None
                self.commit(operation.weight_version, [operation], operated)
            case Update(update_id=update_id):
                assert update_id is not None
                self.begun[update_id].parts.append(operation)
            case Begin(update_id=update_id, weight_version=version):
                self.begun[update_id] = Begun(version or "")
            case Commit(update_id=update_id):
                begun = self.begun.pop(update_id)
                self.commit(begun.version, begun.parts, operated)
            case Abort(update_id=update_id):
                del self.begun[update_id]
            case Sleep(tags=tags):
                self.asleep.update(tags)
            case Wake(tags=tags):
                self.asleep.difference_update(tags)

    @property
    def adapters(self) -> AdapterState:
        """The part of the state that is never in doubt, because the scheduler keeps it."""
        return self.truths[0][2]

    def journal_has(self, truth: Truth) -> bool:
        """True if a process that starts has its weights."""
        return truth[1] == (CHECKPOINT if self.journal is None else self.journal[1])

    def commit(self, version: str, updates: list[Update], operated: Operated) -> None:
        assert operated.weight_version == version
        assert operated.reports
        self.versions.add(version)
        self.truths = [(version, _after(weights, updates), adapters) for _, weights, adapters in self.truths]

    def adapt(self, operation: Adapt, operated: Operated) -> None:
        """Without a version of its own it applies to the last one, which is thereby known."""
        adapters, version = adapted(self.adapters, operation.change), operated.weight_version
        assert version is not None
        assert operated.adapters == adapters
        assert operated.reports
        if operation.publishes:
            assert version == operation.weight_version or operation.weight_version is None
            assert version not in self.versions, "a name that other weights had"
            self.versions.add(version)
        of_it = [truth for truth in self.truths if operation.publishes or truth[0] == version]
        assert of_it, f"the reply has version {version}, and {self.truths} are committed"
        self.truths = [(version, weights, adapters) for _, weights, _ in of_it]

    def has_failed(self, operation: Asked, message: str) -> None:
        """Where all replicas are lost in a commit, the journal knows whether it was made.

        A sleep that failed and could not be undone says so.
        """
        if isinstance(operation, Sleep) and "The server is asleep" in message:
            self.asleep.update(operation.tags)
        version: str | None = None
        updates: list[Update] = []
        match operation:
            case Update(update_id=None):
                version, updates = operation.weight_version, [operation]
            case Commit(update_id=update_id) if update_id in self.begun:
                version, updates = self.begun[update_id].version, self.begun[update_id].parts
        known = {name for name, _, _ in self.truths}
        if self.journal is not None and version == self.journal[0] and version not in known:
            assert version is not None
            self.versions.add(version)
            self.truths += [(version, _after(weights, updates), adapters) for _, weights, adapters in self.truths]


def _after(weights: Weights, updates: list[Update]) -> Weights:
    """``weights`` after ``updates``, as :class:`Process` writes them."""
    process = Process(0, 0, weights=dict(weights))
    for number, one in enumerate(updates):
        process.perform(Perform(number=number, step="prepare", is_primary=True, operation=one))
        process.perform(Perform(number=number, step="write", is_primary=True))
    return process.weights
