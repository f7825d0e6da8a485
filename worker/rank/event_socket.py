"""Messages from a worker to the scheduler, and a socket for those about requests, shared by its threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from ...protocol.messages import FROM_WORKER, FromWorker


@dataclass(frozen=True, slots=True)
class Outgoing:
    """``report`` sends results of operations, ``event`` what happens to requests; ``wake`` ends the loop's wait.

    Any thread may call the last two.
    """

    report: Callable[[FromWorker], None]
    event: Callable[[FromWorker], None]
    wake: Callable[[], None]


class EventSocket:
    """Sends messages to the scheduler at ``backend``, in the order of the calls of :meth:`send`.

    The threads that encode outputs send them too, while the loop may wait at its own socket. A ZMQ socket may be used
    by several threads if a lock orders their uses.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], backend: str, replica: int) -> None:
        self._lock = threading.Lock()
        self._socket = context.socket(zmq.DEALER)
        self._socket.identity = f"events-{replica}".encode()
        self._socket.sndhwm = 0
        self._socket.linger = 500
        self._socket.connect(backend)

    def send(self, message: FromWorker) -> None:
        frames = FROM_WORKER.encode(message)
        with self._lock:
            self._socket.send_multipart(frames, copy=False)
