"""The stage that measures forwards: what a request costs, and how many outputs are worth one forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...protocol.costs import Measured
from ...protocol.replicas import MergeLimit
from .batch import Forward
from .costs import Costs
from .gains import Gains
from .stopwatch import OnMeasured, Stopwatch


class Timing:
    """Measures forwards, outside of everything but the component's call."""

    name = "timing"

    def __init__(self, device: torch.device, max_outputs: int = 1, min_gain: float = 0.0) -> None:
        """Merging has no limits by measured times if ``min_gain`` is 0."""
        self._stopwatch = Stopwatch(device)
        self._costs = Costs()
        self._gains = Gains(max_outputs, min_gain) if min_gain else None

    def __call__(self, forward: Forward, proceed: Callable[[], list[Any]]) -> list[Any]:
        if forward.part:  # the whole forward is measured where its rows are divided
            return proceed()
        with self._stopwatch.timed(self._on_measured(forward)):
            return proceed()

    def running_s(self) -> float | None:
        """Seconds that a GPU has computed a forward whose call has returned."""
        return self._stopwatch.running_s

    def costs(self) -> dict[str, list[Measured]]:
        self._stopwatch.collect()
        return self._costs.measured()

    def merge_limits(self) -> list[MergeLimit]:
        return [] if self._gains is None else self._gains.limits()

    def changed_limits(self) -> list[MergeLimit]:
        """The limits that have changed since the last call, for :meth:`..policy.MergePolicy.limit`."""
        self._stopwatch.collect()
        return [] if self._gains is None else self._gains.changed()

    def _on_measured(self, forward: Forward) -> OnMeasured:
        """The receiver of the forward's seconds; it keeps none of its tensors."""
        name, calls = forward.name, len(forward.calls)
        coroutines = {pending.coroutine for pending in forward.calls}
        own = calls if len(coroutines) == 1 else 0
        outputs, pixels = len(coroutines), max(coroutine.pixels for coroutine in coroutines)
        first = forward.calls[0].batchable
        positions = None if first is None or forward.probe else first.positions

        def add(seconds: float) -> None:
            self._costs.add(name, pixels, seconds, calls=own)
            if self._gains is not None and positions is not None:
                self._gains.add((name, positions), outputs, calls, seconds)

        return add
