"""Heartbeats, from a separate thread, so that they go on during a forward that takes minutes."""

from __future__ import annotations

import os
import threading

import zmq

from ...protocol.messages import FROM_WORKER
from ...protocol.replicas import Heartbeat
from ..forward.activity import Activity

HEARTBEAT_S = 1.0


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
