"""Measured durations of forwards, by component and output size."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...protocol.costs import Measured

_WEIGHT = 0.3
"""Weight of the newest measurement in the moving average."""

_SIZES = 32
"""Output sizes remembered per component; beyond them, the smallest is dropped."""

_PENDING = 64


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


@dataclass(slots=True)
class _Pending:
    """A forward on a GPU, which may still run after its call returned."""

    name: str
    pixels: int
    alone: bool
    began: torch.cuda.Event
    ended: torch.cuda.Event


class Costs:
    """Moving averages of forwards' durations, in seconds."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._means: dict[str, dict[int, _Mean]] = {}
        self._pending: deque[_Pending] = deque(maxlen=_PENDING)

    def measured(self) -> dict[str, list[Measured]]:
        """The averages per component, in ascending order of output size."""
        self._collect()
        return {
            name: [Measured(pixels, mean.seconds) for pixels, mean in sorted(means.items())]
            for name, means in self._means.items()
        }

    @contextlib.contextmanager
    def timed(self, name: str, pixels: int, *, alone: bool) -> Iterator[None]:
        """Measure a forward for outputs of ``pixels``, unless it raises.

        Text encoders, whose cost does not depend on the output's size, and outputs of unknown size are not measured.
        """
        if not pixels or name.startswith("text_encoder"):
            yield
        elif self._on_gpu:
            pending = _Pending(name, pixels, alone, _event(), _event())
            pending.began.record()
            yield
            pending.ended.record()
            self._collect()
            self._pending.append(pending)
        else:
            began = time.perf_counter()
            yield
            self._add(name, pixels, time.perf_counter() - began, alone=alone)

    def _collect(self) -> None:
        """Add the measurements of finished forwards, without waiting for the others."""
        while self._pending and self._pending[0].ended.query():  # type: ignore[no-untyped-call]
            one = self._pending.popleft()
            self._add(one.name, one.pixels, one.began.elapsed_time(one.ended) / 1000, alone=one.alone)

    def _add(self, name: str, pixels: int, seconds: float, *, alone: bool) -> None:
        means = self._means.setdefault(name, {})
        if pixels in means:
            means[pixels].add(seconds, alone=alone)
            return
        if len(means) == _SIZES:
            del means[min(means)]
        means[pixels] = _Mean(seconds, alone)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
