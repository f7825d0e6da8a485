"""Which calls may meet: limits, and what experience has shown."""

from __future__ import annotations

import logging
from collections.abc import Hashable

from .batch import Pending
from .signature import Batchable

log = logging.getLogger(__name__)

MAX_SIGNATURES_APART = 1000
"""Signatures that are remembered as failing when merged; then they are forgotten, and tried again."""

FORWARDS_TO_RECOVER = 16
"""Forwards at a lowered cap that have to fit into memory before twice as much is tried."""


class MergePolicy:
    """``max_batch`` calls and ``max_tokens`` positions may meet in a forward, less where it did not work."""

    def __init__(self, max_batch: int, max_tokens: int) -> None:
        self.max_batch = max_batch
        self.max_tokens = max_tokens
        self.unmergeable: dict[str, str] = {}
        """Calls that run alone, by name, and why."""
        self.caps: dict[str, int] = {}
        """Positions that may meet in calls that have run out of memory, by name."""
        self._fitted: dict[str, int] = {}
        self._apart: set[Hashable] = set()
        self._turns: set[str] = set()

    def batchable(self, pending: Pending) -> Batchable | None:
        """What ``pending`` can be batched by; ``None`` if it has to run alone."""
        found = pending.batchable
        if found is None or pending.call.name in self.unmergeable or found.signature in self._apart:
            return None
        return found

    def max_positions(self, name: str) -> int:
        return min(self.max_tokens, self.caps.get(name, self.max_tokens))

    def never_merge(self, name: str, reason: str) -> None:
        log.warning("calls to %s run alone from now on: %s", name, reason)
        self.unmergeable[name] = reason

    def keep_apart(self, signature: Hashable) -> None:
        """Calls with just this signature failed when merged, and not alone."""
        if len(self._apart) == MAX_SIGNATURES_APART:
            self._apart.clear()
        self._apart.add(signature)

    def takes_turns(self, name: str) -> bool:
        """Whether calls with different adapters cannot meet."""
        return name in self._turns

    def take_turns(self, name: str) -> None:
        self._turns.add(name)

    def adapters_changed(self) -> None:
        """Calls with different ones may meet again where those that there were could not."""
        self._turns.clear()

    def lower_cap(self, name: str, positions: int) -> None:
        """A forward of ``positions`` did not fit into memory."""
        self.caps[name] = max(1, positions // 2)
        self._fitted[name] = 0

    def fitted(self, name: str) -> None:
        """A forward fitted: after some, the cap of its component rises again, as memory may be back."""
        if name not in self.caps:
            return
        self._fitted[name] += 1
        if self._fitted[name] >= FORWARDS_TO_RECOVER:
            self._fitted[name] = 0
            self.caps[name] *= 2
            if self.caps[name] >= self.max_tokens:
                del self.caps[name], self._fitted[name]
