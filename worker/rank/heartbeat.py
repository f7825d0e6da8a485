"""Heartbeats, from a separate thread, so that they go on during a forward that takes minutes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import zmq

from ...protocol.messages import FROM_WORKER
from ...protocol.replicas import Heartbeat, ReplicaStats

HEARTBEAT_S = 1.0


class Activity:
    """The loop's progress, written by the loop alone and read by the heartbeat thread."""

    def __init__(self) -> None:
        self.progress = 0
        """A counter that grows with each step, each forward, and each part of an operation."""
        self.stats = ReplicaStats()
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
        return None if began is None else time.monotonic() - began


class Heartbeats:
    """Sends ``activity`` to the scheduler at ``backend`` every ``interval_s`` seconds, from :meth:`start` on.

    The thread has its own socket: two threads must not share a ZMQ socket, and the loop, which may be busy, cannot
    forward messages for the thread.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        backend: str,
        replica: int,
        activity: Activity,
        interval_s: float = HEARTBEAT_S,
    ) -> None:
        self._context = context
        self._backend = backend
        self._replica = replica
        self._activity = activity
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread, if it was started; the ZMQ context can be destroyed afterwards."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        with self._context.socket(zmq.DEALER) as socket:
            socket.identity = f"heartbeat-{self._replica}".encode()
            socket.linger = 0
            socket.connect(self._backend)
            while not self._ended.wait(self._interval_s):
                socket.send_multipart(FROM_WORKER.encode(self._beat()), copy=False)

    def _beat(self) -> Heartbeat:
        activity = self._activity
        return Heartbeat(self._replica, os.getpid(), activity.stats, activity.progress, activity.forward_s)
