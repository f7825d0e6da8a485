"""The merge policy: limits on merged forwards, and what failures have taught."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager

from ...protocol.replicas import MergeLimit
from .batch import Pending
from .gains import Kind
from .signature import Batchable

log = logging.getLogger(__name__)

MAX_SIGNATURES_APART = 1000
"""Signatures remembered as failing when merged; when full, all are cleared and tried again."""

MAX_KINDS = 1000
"""Kinds of calls with a limit; beyond them, the one used least recently is forgotten."""

FORWARDS_TO_RECOVER = 16
"""Forwards that must fit into memory at a lowered cap before the cap doubles."""


class MergePolicy:
    """A forward has calls of at most ``max_batch`` outputs and ``max_tokens`` positions, fewer where that failed."""

    def __init__(self, max_batch: int, max_tokens: int) -> None:
        self.max_batch = max_batch
        self.max_tokens = max_tokens
        self.measured = False
        """True if calls of a kind run for one output until :meth:`limit` allows more."""
        self._limits: OrderedDict[Kind, int] = OrderedDict()
        self.unmergeable: dict[str, str] = {}
        """The reason why calls run alone, by name."""
        self.caps: dict[str, int] = {}
        """Lowered limits on positions, by name of the calls that ran out of memory."""
        self._fitted: dict[str, int] = {}
        self._too_many: dict[str, int] = {}
        self._apart: set[Hashable] = set()
        self._turns: set[str] = set()

    def batchable(self, pending: Pending) -> Batchable | None:
        """The arguments to batch ``pending`` by; ``None`` if it must run alone."""
        found = pending.batchable
        if found is None or pending.call.name in self.unmergeable:
            return None
        if self._apart and found.signature in self._apart:  # the hash of a signature takes its time
            return None
        return found

    def limit(self, limits: Iterable[MergeLimit]) -> None:
        """Set the numbers of outputs that are worth a forward, by kind of call. Every rank does so in the same step."""
        for one in limits:
            self._limits[one.name, one.positions] = one.outputs
            self._limits.move_to_end((one.name, one.positions))
        while len(self._limits) > MAX_KINDS:
            self._limits.popitem(last=False)

    @contextmanager
    def unmeasured(self) -> Iterator[None]:
        """Within this context, measured times limit no forward."""
        before, self.measured = self.measured, False
        try:
            yield
        finally:
            self.measured = before

    def max_outputs(self, kind: Kind) -> int:
        """The outputs that may share a forward of calls of ``kind``. Every rank asks in the same order."""
        if not self.measured:
            return self.max_batch
        if kind not in self._limits:
            return 1
        self._limits.move_to_end(kind)
        return min(self.max_batch, self._limits[kind])

    def max_positions(self, name: str) -> int:
        return min(self.max_tokens, self.caps.get(name, self.max_tokens))

    def never_merge(self, name: str, reason: str) -> None:
        log.warning("calls to %s run alone from now on: %s", name, reason)
        self.unmergeable[name] = reason

    def keep_apart(self, signature: Hashable) -> None:
        """Never merge calls of this signature again: they failed merged and succeeded alone."""
        if len(self._apart) == MAX_SIGNATURES_APART:
            self._apart.clear()
        self._apart.add(signature)

    def takes_turns(self, name: str) -> bool:
        """True if calls with different adapters cannot merge."""
        return name in self._turns

    def take_turns(self, name: str) -> None:
        self._turns.add(name)

    def adapters_changed(self) -> None:
        """Let calls with different adapters merge again, as the new ones may be mixable."""
        self._turns.clear()

    def lower_cap(self, name: str, positions: int) -> None:
        """Halve the cap after a forward of ``positions`` ran out of memory."""
        self.caps[name] = max(1, positions // 2)
        self._fitted[name] = 0
        self._too_many[name] = max(positions, self._too_many.get(name, 0))

    def fitted(self, name: str) -> None:
        """Count a forward that fitted; after :data:`FORWARDS_TO_RECOVER` the cap doubles again."""
        if name not in self.caps:
            return
        self._fitted[name] += 1
        if self._fitted[name] >= FORWARDS_TO_RECOVER:
            self._fitted[name] = 0
            self.caps[name] *= 2
            if self.caps[name] >= min(self.max_tokens, self._too_many[name]):
                del self.caps[name], self._fitted[name], self._too_many[name]
