"""The progress of the loop that runs forwards, which heartbeats report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ...protocol.replicas import ReplicaStats


class Activity:
    """The loop's progress, written by the loop alone and read by the heartbeat thread."""

    def __init__(self) -> None:
        self.progress = 0
        """A counter that grows with each step, each forward, and each part of an operation."""
        self.stats = ReplicaStats()
        self.on_device: Callable[[], float | None] = lambda: None
        """Seconds that the device has computed a forward whose call has returned. The loop may wait for it anywhere."""
        self._forward_began: float | None = None

    def advance(self) -> None:
        self.progress += 1

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Mark the context as a forward; within another one, a probe is the current forward until it ends."""
        outer, self._forward_began = self._forward_began, time.monotonic()
        self.advance()
        try:
            yield
        finally:
            self._forward_began = outer
            self.advance()

    @property
    def forward_s(self) -> float | None:
        """Seconds since the current forward began; ``None`` between forwards."""
        began = self._forward_began
        return self.on_device() if began is None else time.monotonic() - began
