"""Measured durations of forwards, by component and output size."""

from __future__ import annotations

from dataclasses import dataclass

from ...protocol.costs import Measured

_WEIGHT = 0.3
"""Weight of the newest measurement in the moving average."""

_SIZES = 32
"""Output sizes remembered per component; beyond them, the smallest is dropped."""


@dataclass(slots=True)
class _Mean:
    seconds: float
    calls: int

    def add(self, seconds: float, calls: int) -> None:
        """Add a forward of ``calls`` of one output, or of 0 if outputs share it. Those with most calls count.

        A shared one is an upper bound, used until an output had a forward for itself.
        """
        if calls > self.calls:
            self.seconds, self.calls = seconds, calls
        elif calls == self.calls:
            self.seconds += _WEIGHT * (seconds - self.seconds)


class Costs:
    """Moving averages of forwards' durations, in seconds."""

    def __init__(self) -> None:
        self._means: dict[str, dict[int, _Mean]] = {}

    def measured(self) -> dict[str, list[Measured]]:
        """The averages per component, in ascending order of output size."""
        return {
            name: [Measured(pixels, mean.seconds) for pixels, mean in sorted(means.items())]
            for name, means in self._means.items()
        }

    def add(self, name: str, pixels: int, seconds: float, *, calls: int) -> None:
        """Add a forward of ``calls`` for one output of ``pixels``; ``calls`` is 0 if outputs share it.

        Text encoders, whose cost does not depend on the output's size, and outputs of unknown size are left out.
        """
        if not pixels or name.startswith("text_encoder"):
            return
        means = self._means.setdefault(name, {})
        if pixels in means:
            means[pixels].add(seconds, calls)
            return
        if len(means) == _SIZES:
            del means[min(means)]
        means[pixels] = _Mean(seconds, calls)
