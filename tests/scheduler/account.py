"""What a trainer knows of the weights from the answers that it got, to hold against what replicas have."""

from dataclasses import dataclass, field
from typing import TypeAlias

from safelight.protocol.operations import (
    Abort,
    Begin,
    Commit,
    Operated,
    Operation,
    Perform,
    Sleep,
    Update,
    Wake,
)
from safelight.tests.scheduler.operating import CHECKPOINT, Process

Weights: TypeAlias = dict[str, str]
Truth: TypeAlias = tuple[str, Weights]
"""A version and its weights."""


@dataclass
class Begun:
    version: str
    parts: list[Update] = field(default_factory=list)


class Account:
    """``truths`` are what may be committed: more than one where all replicas were lost in a commit.

    ``journal`` is what the replicas have written down.
    """

    def __init__(self) -> None:
        self.truths: list[Truth] = [("0", dict(CHECKPOINT))]
        self.journal: Truth | None = None
        self.asleep: set[str] = set()
        self.begun: dict[str, Begun] = {}

    def is_done(self, operation: Operation | None, operated: Operated) -> None:
        match operation:
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

    def commit(self, version: str, updates: list[Update], operated: Operated) -> None:
        assert operated.weight_version == version
        assert operated.reports
        self.truths = [(version, _after(weights, updates)) for _, weights in self.truths]

    def has_failed(self, operation: Operation | None) -> None:
        """Where all replicas are lost in a commit, the journal knows whether it was made."""
        version: str | None = None
        updates: list[Update] = []
        match operation:
            case Update(update_id=None):
                version, updates = operation.weight_version, [operation]
            case Commit(update_id=update_id) if update_id in self.begun:
                version, updates = self.begun[update_id].version, self.begun[update_id].parts
        if self.journal is not None and version == self.journal[0] and version not in {name for name, _ in self.truths}:
            assert version is not None
            self.truths += [(version, _after(weights, updates)) for _, weights in self.truths]


def _after(weights: Weights, updates: list[Update]) -> Weights:
    """What ``weights`` become by ``updates``, as :class:`Process` writes them."""
    process = Process(0, 0, weights=dict(weights))
    for number, one in enumerate(updates):
        process.perform(Perform(number=number, step="prepare", leads=True, operation=one))
        process.perform(Perform(number=number, step="write", leads=True))
    return process.weights
