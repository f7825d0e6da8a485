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
    alone: bool

    def add(self, seconds: float, *, alone: bool) -> None:
        """Add a measurement. One of several merged calls is an upper bound, used until a call was measured alone."""
        if alone and not self.alone:
            self.seconds, self.alone = seconds, True
        elif alone == self.alone:
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

    def add(self, name: str, pixels: int, seconds: float, *, alone: bool) -> None:
        """Add a forward for outputs of ``pixels``.

        Text encoders, whose cost does not depend on the output's size, and outputs of unknown size are left out.
        """
        if not pixels or name.startswith("text_encoder"):
            return
        means = self._means.setdefault(name, {})
        if pixels in means:
            means[pixels].add(seconds, alone=alone)
            return
        if len(means) == _SIZES:
            del means[min(means)]
        means[pixels] = _Mean(seconds, alone)
