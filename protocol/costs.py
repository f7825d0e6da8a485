"""The cost of a forward: measured in the worker, estimated for other sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec


class Measured(msgspec.Struct, frozen=True):
    """The seconds of a forward of a component for one output of about ``pixels``, all frames of a clip together."""

    pixels: int
    seconds: float


def output_pixels(width: int | None, height: int | None, frames: int | None, *, default: int) -> int:
    """Pixels of an output, all frames together; ``default`` where no size is known."""
    return default if not width or not height else width * height * max(1, frames or 1)


def estimate(measured: Sequence[Measured], pixels: int) -> float:
    """Seconds of one call for ``pixels``; never too few, as long as cost grows no faster than by the square.

    Attention grows with the square of its positions and all else in proportion to them, so that a call that is ``k``
    times as large takes at most k² times as long, and a smaller one at most as long. Of all that was measured, the
    bound is taken that is nearest. Small calls, which cost mostly overhead, make the estimate for large ones too high.
    """
    return min((one.seconds * max(1.0, pixels / one.pixels) ** 2 for one in measured), default=0.0)


def longest(costs: Mapping[str, Sequence[Measured]], pixels: int) -> tuple[str, float]:
    """The component whose call takes longest for ``pixels``, and for how many seconds by :func:`estimate`."""
    estimates = {name: estimate(measured, pixels) for name, measured in costs.items()}
    name = max(estimates, key=lambda one: estimates[one], default="")
    return name, estimates.get(name, 0.0)


def most_pixels(costs: Mapping[str, Sequence[Measured]], limit_s: float) -> int:
    """The pixels up to which no component's call takes longer than ``limit_s``, by the same bound."""
    found = [
        max(int(one.pixels * (limit_s / one.seconds) ** 0.5) if one.seconds <= limit_s else 0 for one in measured)
        for measured in costs.values()
        if measured
    ]
    return min(found, default=0)
