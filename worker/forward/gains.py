"""The gain of merging: measured seconds per call by batch size, which decide how many outputs share a forward.

A device that is busy with one output computes two in twice the time: merging them only makes everybody wait longer for
the end of a forward. So the batch size of a kind of call doubles as long as the seconds per call fall by ``min_gain``.
Forwards shorter than :data:`SHORT_S` may always grow, because nobody notices the wait.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from ...protocol.replicas import MergeLimit

Kind = tuple[str, int]
"""The name of a call and its positions: calls of one kind take equally long."""

SHORT_S = 0.1
"""A forward of this length may always grow."""

SAMPLES = 3
"""Measurements of a batch size without a gain that end the growth; fewer may be slow by chance, or the first ones."""

_WINDOW = 8
"""Newest measurements of a batch size. The fastest counts, as others were slowed down by something else."""

RETRY_FORWARDS = 128
"""Forwards at the limit after which the next batch size is measured again."""

_KINDS = 256


@dataclass(slots=True)
class _Measured:
    """Seconds per call of one kind, by the number of outputs in the forward."""

    seconds: dict[int, deque[float]] = field(default_factory=dict)
    calls_per_output: float = 1.0
    limit: int = 0
    at_limit: int = 0

    def fastest(self, outputs: int) -> float | None:
        found = self.seconds.get(outputs)
        return min(found) if found else None


class Gains:
    """Decides a limit on the outputs of a forward for each kind of call, at most ``max_outputs``.

    ``sizes`` are the batch sizes that are compared: powers of two, and ``max_outputs``.
    """

    def __init__(self, max_outputs: int, min_gain: float) -> None:
        powers = (1 << exponent for exponent in range(max_outputs.bit_length()))
        self.sizes = sorted({*(power for power in powers if power < max_outputs), max_outputs})
        self._min_gain = min_gain
        self._kinds: OrderedDict[Kind, _Measured] = OrderedDict()
        self._changed: dict[Kind, MergeLimit] = {}

    def add(self, kind: Kind, outputs: int, calls: int, seconds: float) -> None:
        """Add a forward of ``calls`` of ``kind`` for ``outputs``."""
        measured = self._kinds.setdefault(kind, _Measured())
        self._kinds.move_to_end(kind)
        if outputs in self.sizes:
            measured.seconds.setdefault(outputs, deque(maxlen=_WINDOW)).append(seconds / calls)
            measured.calls_per_output = max(measured.calls_per_output, calls / outputs)
            self._try_again(measured, outputs)
        self._decide(kind, measured)
        while len(self._kinds) > _KINDS:
            self._kinds.popitem(last=False)

    def changed(self) -> list[MergeLimit]:
        """The limits that changed since the last call."""
        changed, self._changed = self._changed, {}
        return [*changed.values()]

    def limits(self) -> list[MergeLimit]:
        """Every known limit, the most recently used kind last."""
        return [_limit(kind, measured) for kind, measured in self._kinds.items()]

    def _decide(self, kind: Kind, measured: _Measured) -> None:
        limit = self._limit(measured)
        if limit != measured.limit:
            measured.limit, measured.at_limit = limit, 0
            self._changed[kind] = _limit(kind, measured)

    def _limit(self, measured: _Measured) -> int:
        """The size up to which each larger one has a gain, or is not known well enough to be without one."""
        best = math.inf
        for size, larger in zip(self.sizes, [*self.sizes[1:], None], strict=True):
            best = min(best, measured.fastest(size) or math.inf)
            if larger is None or best is math.inf:
                return size
            if self._is_short(best, larger, measured):
                continue
            samples = measured.seconds.get(larger, ())
            if len(samples) < SAMPLES:
                return larger
            fastest = min(samples)
            if fastest > best * (1 - self._min_gain) and not self._is_short(fastest, larger, measured):
                return size
        raise AssertionError("the largest size has no larger one")

    def _is_short(self, seconds: float, outputs: int, measured: _Measured) -> bool:
        return seconds * outputs * measured.calls_per_output <= SHORT_S

    def _try_again(self, measured: _Measured, outputs: int) -> None:
        """Forget the measurements of the next size now and then: the machine may have been busy with something else."""
        if outputs != measured.limit or outputs == self.sizes[-1]:
            return
        measured.at_limit += 1
        if measured.at_limit >= RETRY_FORWARDS:
            measured.at_limit = 0
            measured.seconds.pop(self.sizes[self.sizes.index(outputs) + 1], None)


def _limit(kind: Kind, measured: _Measured) -> MergeLimit:
    seconds = {str(outputs): min(found) for outputs, found in sorted(measured.seconds.items())}
    return MergeLimit(*kind, measured.limit, seconds)
