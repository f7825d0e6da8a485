"""A forward: one call of a component that answers the calls of several coroutines."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from ..crossing.call import Call
from ..crossing.coroutine import Coroutine
from ..crossing.thread_state import ThreadState
from .adapters import ActiveAdapters
from .signature import Batchable


@dataclass(slots=True, eq=False)
class Wait:
    """A coroutine that waits for ``answers``; ``missing`` counts those to come, ``error`` is the first failure."""

    coroutine: Coroutine
    answers: list[Any]
    missing: int
    error: Exception | None = None
    abandoned: bool = False
    """True when the coroutine was cancelled and the answers are no longer needed."""


@dataclass(slots=True, eq=False)
class Pending:
    """A call that a coroutine waits for, as answer ``index`` of ``wait``.

    A call without ``batchable`` runs alone. ``prompt`` is the cache key of a text encoder's call: equal keys have equal
    answers. ``state`` holds torch's settings for the call if they differ from the batcher's. ``first`` says that
    its coroutine has not waited for a call of this name before. ``passed`` counts the forwards that went before it when
    it was the oldest call.
    """

    wait: Wait
    index: int
    call: Call
    state: ThreadState | None
    first: bool = False
    passed: int = 0
    batchable: Batchable | None = None
    prompt: Hashable | None = None

    @property
    def coroutine(self) -> Coroutine:
        return self.wait.coroutine


@dataclass(slots=True)
class Outcome:
    """A call's return value or exception."""

    value: Any = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """Calls that run as one; ``adapters`` has the active adapters of each.

    A ``probe`` runs only to find out the structure of its output; its values are discarded. A ``part`` has some rows of
    a forward whose other rows are computed elsewhere.
    """

    calls: Sequence[Pending]
    adapters: Sequence[ActiveAdapters]
    probe: bool = False
    part: bool = False

    @property
    def name(self) -> str:
        return self.calls[0].call.name

    @property
    def component(self) -> str:
        return self.calls[0].call.component

    @property
    def merged(self) -> bool:
        return len(self.calls) > 1

    @property
    def state(self) -> ThreadState | None:
        """Torch's settings, which all calls share."""
        return self.calls[0].state

    @property
    def parts(self) -> list[Batchable]:
        """The arguments of each call. Requires that every call is batchable."""
        found = [pending.batchable for pending in self.calls]
        assert None not in found, "calls that meet can be batched"
        return [part for part in found if part is not None]

    @property
    def positions(self) -> int:
        return sum(part.positions for part in self.parts)

    def slice(self, start: int, end: int) -> Forward:
        return Forward(self.calls[start:end], self.adapters[start:end])

    def halves(self) -> list[Forward]:
        half = len(self.calls) // 2
        return [self.slice(0, half), self.slice(half, len(self.calls))]

    def single(self) -> list[Forward]:
        """One forward per call."""
        return [self.slice(index, index + 1) for index in range(len(self.calls))]

    def probe_of_first(self) -> Forward:
        return Forward(self.calls[:1], self.adapters[:1], probe=True)

    def by_adapters(self) -> list[Forward]:
        """One forward per combination of adapters."""
        indices: dict[ActiveAdapters, list[int]] = {}
        for index, uses in enumerate(self.adapters):
            indices.setdefault(uses, []).append(index)
        return [Forward([self.calls[i] for i in alike], [uses] * len(alike)) for uses, alike in indices.items()]
