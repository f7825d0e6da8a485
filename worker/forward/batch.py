"""A forward: the calls that are answered by one call of a component."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from ..crossing.call import Call
from ..crossing.coroutine import Coroutine
from ..crossing.thread_state import ThreadState
from ..lora.bank import ActiveAdapters
from .signature import Batchable


@dataclass(slots=True, eq=False)
class Wait:
    """A coroutine that waits for ``answers``, of which ``missing`` are not there; one call may have failed."""

    coroutine: Coroutine
    answers: list[Any]
    missing: int
    error: Exception | None = None
    abandoned: bool = False
    """Nobody waits any more."""


@dataclass(slots=True, eq=False)
class Pending:
    """A call that a coroutine waits for, as answer ``index`` of ``wait``.

    Without ``batchable`` it can only be made alone. A call with a ``prompt`` is a text encoder's; two with the same one
    have the same answer. ``state`` are the settings of torch with which the call is made, where they are not the
    batcher's.
    """

    wait: Wait
    index: int
    call: Call
    state: ThreadState | None
    batchable: Batchable | None = None
    prompt: Hashable | None = None

    @property
    def coroutine(self) -> Coroutine:
        return self.wait.coroutine


@dataclass(slots=True)
class Outcome:
    """What a call returned or raised."""

    value: Any = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """Calls that are made as one; ``adapters`` are those of each.

    A ``probe`` is made only to see the form of its output, and its numbers are nobody's answer.
    """

    calls: Sequence[Pending]
    adapters: Sequence[ActiveAdapters]
    probe: bool = False

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
        """The settings of torch that all of its calls share."""
        return self.calls[0].state

    @property
    def parts(self) -> list[Batchable]:
        """The arguments of each call. Only of a forward whose calls can all be batched."""
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
        """A forward for each call."""
        return [self.slice(index, index + 1) for index in range(len(self.calls))]

    def probe_of_first(self) -> Forward:
        return Forward(self.calls[:1], self.adapters[:1], probe=True)

    def by_adapters(self) -> list[Forward]:
        """A forward for each choice of adapters."""
        indices: dict[ActiveAdapters, list[int]] = {}
        for index, uses in enumerate(self.adapters):
            indices.setdefault(uses, []).append(index)
        return [Forward([self.calls[i] for i in alike], [uses] * len(alike)) for uses, alike in indices.items()]
