"""Lockstep: the leader broadcasts every step to the other ranks of its replica, so that all do the same in order.

Each step is one message from rank 0 to every other rank. If the step has a forward, its digest follows. A rank that
would run another forward, or none, must stop, because its next collective would meet a different one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import msgspec
import zmq

from ...protocol.codec import Codec
from ...protocol.generation import Cancel, Generate
from ...protocol.operations import Perform, SetPaused
from ...protocol.replicas import MergeLimit


class SettleJoin(msgspec.Struct, tag=True, frozen=True):
    """Sent by the leader alone: agree on the join ordered as ``number``; ``late`` if its deadline has passed."""

    number: int
    late: bool


class Step(msgspec.Struct, tag=True, frozen=True):
    """The work before the next forward: messages to handle, and ``dropped`` requests, which failed on the leader.

    ``limits`` are those on merging that the leader's measurements have changed.
    """

    messages: list[Generate | Cancel | Perform | SetPaused | SettleJoin]
    dropped: list[str]
    limits: list[MergeLimit] = []


class StartForward(msgspec.Struct, tag=True, frozen=True):
    """The leader's next forward, by its :attr:`..batcher.Batcher.schedule_digest`."""

    digest: int


class Stop(msgspec.Struct, tag=True, frozen=True):
    """There are no more steps."""


class RankDesync(Exception):
    """This rank's next forward is not the leader's."""


_MESSAGES: Codec[Step | StartForward | Stop] = Codec(Step | StartForward | Stop)


class Leader:
    """Rank 0's side. Sockets are bound below ``rendezvous_path``, which is unique to this start."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], rendezvous_path: str, size: int) -> None:
        self._sockets = [_socket(context, zmq.PUSH) for _ in range(1, size)]
        for rank, socket in enumerate(self._sockets, start=1):
            socket.bind(_address(rendezvous_path, rank))

    def broadcast(self, message: Step | StartForward) -> None:
        """Send to every rank, also to one that is yet to connect; wait for that."""
        if not self._sockets:
            return
        frames = _MESSAGES.encode(message)
        for socket in self._sockets:
            socket.send_multipart(frames, copy=False)

    def stop(self) -> None:
        """Tell the other ranks that there are no more steps, those that are still there."""
        frames = _MESSAGES.encode(Stop())
        for socket in self._sockets:
            with contextlib.suppress(zmq.Again):  # no rank is connected, and none will be
                socket.send_multipart(frames, flags=zmq.NOBLOCK, copy=False)

    def before_forward(self, digest: int) -> None:
        """Send the digest of the next forward to the other ranks."""
        self.broadcast(StartForward(digest))


class Follower:
    """The side of every other rank."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], rendezvous_path: str, rank: int) -> None:
        self._socket = _socket(context, zmq.PULL)
        self._socket.connect(_address(rendezvous_path, rank))

    def run(self, run_step: Callable[[Step], None]) -> None:
        """Run the leader's steps until it stops. Raises ``RankDesync`` if it starts a forward that this rank lacks."""
        while isinstance(message := self._next(), Step):
            run_step(message)
        if isinstance(message, StartForward):
            raise RankDesync("the leader runs a forward, and this rank has none to run")

    def before_forward(self, digest: int) -> None:
        """Compare this rank's next forward with the leader's. Raises ``RankDesync`` if they differ."""
        message = self._next()
        if not isinstance(message, StartForward):
            raise RankDesync("this rank has a forward to run, and the leader runs none")
        if message.digest != digest:
            raise RankDesync("this rank's forward is for other calls than the leader's")

    def _next(self) -> Step | StartForward | Stop:
        return _MESSAGES.decode(self._socket.recv_multipart())


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.linger = 500
    return socket


def _address(rendezvous_path: str, rank: int) -> str:
    return f"ipc://{rendezvous_path}-rank-{rank}"
