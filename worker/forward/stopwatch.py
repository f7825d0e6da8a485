"""Measures forwards. On a GPU they end after their call has returned, so their times are known later."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

_PENDING = 64

OnMeasured = Callable[[float], None]
"""Receives the seconds of a forward."""


@dataclass(slots=True)
class _Pending:
    """A forward on a GPU, which may still run."""

    began: torch.cuda.Event
    ended: torch.cuda.Event
    on_measured: OnMeasured
    launched: float


class Stopwatch:
    """Calls back with the seconds of each forward, in the order of the forwards; never waits for a device."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._pending: deque[_Pending] = deque(maxlen=_PENDING)

    @contextlib.contextmanager
    def timed(self, on_measured: OnMeasured) -> Iterator[None]:
        """Measure the context, unless it raises. ``on_measured`` must not keep tensors, as it is kept for a while."""
        if self._on_gpu:
            pending = _Pending(_event(), _event(), on_measured, time.monotonic())
            pending.began.record()
            yield
            pending.ended.record()
            self.collect()
            self._pending.append(pending)
        else:
            began = time.perf_counter()
            yield
            on_measured(time.perf_counter() - began)

    @property
    def running_s(self) -> float | None:
        """Seconds since the oldest forward was launched that the GPU still computes; ``None`` if there is none.

        Any thread may ask.
        """
        for pending in tuple(self._pending):
            if not pending.ended.query():  # type: ignore[no-untyped-call]
                return time.monotonic() - pending.launched
        return None

    def collect(self) -> None:
        """Report the forwards that have ended by now."""
        while self._pending and self._pending[0].ended.query():  # type: ignore[no-untyped-call]
            one = self._pending.popleft()
            one.on_measured(one.began.elapsed_time(one.ended) / 1000)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
