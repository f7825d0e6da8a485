"""The scheduler's loop: frames in, decisions, frames out. It sleeps until a message comes or a deadline passes."""

from __future__ import annotations

import logging
import math
import time
from typing import NoReturn, TypeVar

import zmq

from ..protocol.child_config import ChildConfig
from ..protocol.codec import Codec
from ..protocol.messages import FROM_SCHEDULER, FROM_WORKER, TO_SCHEDULER, TO_WORKER
from .dispatcher import Dispatcher

logger = logging.getLogger(__name__)

M = TypeVar("M")
Router = zmq.Socket[bytes]

MESSAGES_A_TURN = 256
"""Messages read from one socket before the other one and the deadlines get their turn."""

IDENTITY_PREFIX = b"replica-"

SENDING_PREFIXES = (b"events-", b"heartbeat-")
"""The identity of a socket over which a worker only sends begins like this."""


class Loop:
    """Two sockets around a :class:`Dispatcher`. Raises ``zmq.ZMQError`` when a socket cannot be bound."""

    def __init__(self, child: ChildConfig, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._dispatcher = Dispatcher(child.config, child.adapters)
        self._server: bytes | None = None  # known from its first message on
        self._frontend = _bind(context, child.frontend)
        self._backend = _bind(context, child.backend)
        self._poller = zmq.Poller()
        self._poller.register(self._frontend, zmq.POLLIN)
        self._poller.register(self._backend, zmq.POLLIN)

    def run(self) -> NoReturn:
        while True:
            self._wait()
            # Messages before deadlines: after a pause of this process, the heartbeats that came meanwhile count.
            self._read_backend()
            self._read_frontend()
            self._dispatcher.turn(time.monotonic())
            self._flush()

    def _wait(self) -> None:
        timeout_s = max(0.0, self._dispatcher.next_turn() - time.monotonic())
        self._poller.poll(math.ceil(timeout_s * 1000))

    def _read_backend(self) -> None:
        for _ in range(MESSAGES_A_TURN):
            if (received := _receive(self._backend)) is None:
                return
            sender, body = received
            message, number = _decode(FROM_WORKER, sender, body), _replica_number(sender)
            if message is not None and number is not None:
                self._dispatcher.from_worker(number, message, time.monotonic())

    def _read_frontend(self) -> None:
        for _ in range(MESSAGES_A_TURN):
            if (received := _receive(self._frontend)) is None:
                return
            sender, body = received
            self._dispatcher.heard += 1
            message = _decode(TO_SCHEDULER, sender, body)
            if message is None:
                continue
            if sender != self._server:
                self._server = sender
                self._dispatcher.greet()
            self._dispatcher.from_server(message, time.monotonic())

    def _flush(self) -> None:
        outbox = self._dispatcher.take_outbox()
        for number, order in outbox.to_replicas:
            _send(self._backend, IDENTITY_PREFIX + b"%d" % number, TO_WORKER.encode(order))
        if self._server is not None:  # before, there is nothing but status to tell, and nobody to tell it to
            for report in outbox.to_server:
                _send(self._frontend, self._server, FROM_SCHEDULER.encode(report))


def _bind(context: zmq.Context[zmq.Socket[bytes]], address: str) -> Router:
    """A ROUTER that drops messages only if their peer is gone."""
    socket: Router = context.socket(zmq.ROUTER)
    socket.linger = 0
    socket.sndhwm = 0  # at a limit, a ROUTER would silently drop; the queue and max_running bound what is sent
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a restarted worker takes over its identity from the dead one
    socket.bind(address)
    return socket


def _receive(socket: Router) -> tuple[bytes, list[memoryview]] | None:
    """The sender's identity and the frames of one message, not copied, or ``None`` when there is none."""
    try:
        identity, *body = socket.recv_multipart(zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return None
    return identity.bytes, [frame.buffer for frame in body]


def _send(socket: Router, identity: bytes, frames: list[bytes | memoryview]) -> None:
    socket.send_multipart([identity, *frames], copy=False)


def _decode(codec: Codec[M], sender: bytes, body: list[memoryview]) -> M | None:
    """The message in ``body``, or ``None`` after a log line if it is malformed."""
    try:
        return codec.decode(body)
    except (ValueError, IndexError, RecursionError) as error:  # msgspec's and Unicode's errors are ValueErrors
        logger.warning("dropped a malformed message of %d frames from %r: %s", len(body), sender, error)
        return None


def _replica_number(identity: bytes) -> int | None:
    for prefix in (IDENTITY_PREFIX, *SENDING_PREFIXES):
        digits = identity.removeprefix(prefix)
        if identity.startswith(prefix) and digits.isdigit() and len(digits) < 10:
            return int(digits)
    logger.warning("dropped a message from %r, which is not a replica", identity)
    return None
