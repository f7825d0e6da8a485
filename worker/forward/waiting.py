"""The calls that wait for a forward, and which of them make the next one."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator

from ..crossing.coroutine import Coroutine
from .adapters import ActiveAdapters, Adapters
from .batch import Forward, Pending
from .policy import MergePolicy
from .prompt_cache import PromptCache, prompt_of
from .signature import Batchable

MAX_PASSES = 4
"""Forwards that may pass a call at the head of the queue; requests that keep arriving would delay it without end."""


class WaitingCalls:
    """A queue in the order in which calls became ready.

    The first call decides the signature of the next forward, and every later one with the same signature joins it, up
    to the caps of ``policy``. The others keep their places, so that no signature starves.

    Coroutines that have just started catch up: their prompts are encoded before the denoiser's next step, which they
    then join. So those that arrive within a step run all their steps together, and their outputs are decoded at once.
    """

    def __init__(self, policy: MergePolicy, cache: PromptCache | None, adapters: Adapters | None) -> None:
        self._policy = policy
        self._cache = cache
        self._adapters = adapters
        self._calls: deque[Pending] = deque()

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[Pending]:
        return iter(self._calls)

    def extend(self, calls: Iterable[Pending]) -> None:
        self._calls.extend(calls)

    def remove(self, coroutine: Coroutine) -> list[Pending]:
        """Take out the calls of ``coroutine``, and return them."""
        removed = [pending for pending in self._calls if pending.coroutine is coroutine]
        if removed:
            self._calls = deque(pending for pending in self._calls if pending.coroutine is not coroutine)
        return removed

    def next_forward(self) -> Forward:
        """Take out of the queue the call whose turn it is, and all that may join it."""
        first = self._take_first()
        part, uses = self._policy.batchable(first), self._uses(first)
        if part is None or self._is_cached(first, uses):
            return Forward([first], [uses])
        batch = _Batch(first, part, uses, self._policy)
        self._calls = deque(other for other in self._calls if not self._joined(batch, other))
        return Forward(batch.calls, batch.adapters)

    def _take_first(self) -> Pending:
        """Take the head of the queue, or before it the call of a coroutine that has waited less often.

        Only the first call of each name passes others: a coroutine that made all its calls before theirs, as it never
        catches up with a longer one, would starve them. None passes a call that it cannot share a forward with later.
        """
        first = head = self._calls[0]
        if head.passed < MAX_PASSES and self._policy.batchable(head) is not None:
            for other in self._calls:
                earlier = other.coroutine.waits < first.coroutine.waits
                if other.first and earlier and other.call.name != head.call.name and not other.coroutine.alone:
                    first = other
        head.passed += first is not head
        self._calls.remove(first)
        return first

    def _joined(self, batch: _Batch, other: Pending) -> bool:
        part = self._policy.batchable(other)
        return part is not None and batch.alike(other, part) and batch.take(other, part, self._uses(other))

    def _is_cached(self, pending: Pending, uses: ActiveAdapters) -> bool:
        key = prompt_of(pending, uses)
        return self._cache is not None and self._cache.holds(key, exact=self._cache.needs_exact(pending.coroutine))

    def _uses(self, pending: Pending) -> ActiveAdapters:
        if self._adapters is None:
            return ()
        return self._adapters.uses(pending.call.component, pending.coroutine.wanted)


class _Batch:
    """The calls of a forward that is being put together."""

    def __init__(self, first: Pending, part: Batchable, uses: ActiveAdapters, policy: MergePolicy) -> None:
        self.calls, self.adapters = [first], [uses]
        self._signature, self._state = part.signature, first.state
        self._max_outputs = policy.max_outputs((first.call.name, part.positions))
        self._max_positions = policy.max_positions(first.call.name)
        self._takes_turns = policy.takes_turns(first.call.name)
        self._positions = part.positions
        self._prompts: set[Hashable] = {prompt_of(first, uses)}
        self._coroutines = {first.coroutine}

    def alike(self, other: Pending, part: Batchable) -> bool:
        return part.signature == self._signature and other.state == self._state

    def take(self, other: Pending, part: Batchable, uses: ActiveAdapters) -> bool:
        """Add ``other`` if it fits, and say whether it was added."""
        is_new = other.coroutine not in self._coroutines  # the calls of one coroutine, as of guidance, count as one
        if (is_new and len(self._coroutines) == self._max_outputs) or (
            self._positions + part.positions > self._max_positions
        ):
            return False
        if self._takes_turns and uses != self.adapters[0]:
            return False
        prompt = prompt_of(other, uses)
        if prompt is not None and prompt in self._prompts:  # it waits for the other's answer in the cache
            return False
        self.calls.append(other)
        self.adapters.append(uses)
        self._positions += part.positions
        self._prompts.add(prompt)
        self._coroutines.add(other.coroutine)
        return True
