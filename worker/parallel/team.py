"""The leader of a replica tells its other ranks what to do, so that all do the same in the same order.

Each turn goes as one message from rank 0 to every other. A turn carries a digest of what was done before it; a rank
that did something else must not go on, since its next collective would meet another one.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import zmq

from ...protocol.codec import Codec
from ...protocol.messages import Cancel, Generate
from ...protocol.operations import Perform, SetPaused


class SettleJoin(msgspec.Struct, tag=True, frozen=True):
    """The leader's own: see how far every rank is with the join that was ordered as ``number``; ``late`` ends it."""

    number: int
    late: bool


class Turn(msgspec.Struct, tag=True, frozen=True):
    """What happens before the next forward: requests that start or end, and ones whose outputs could not be encoded.

    ``trace`` is the leader's :attr:`.batcher.Hub.trace` before the turn.
    """

    messages: list[Generate | Cancel | Perform | SetPaused | SettleJoin]
    dropped: list[str]
    trace: int


class Stop(msgspec.Struct, tag=True, frozen=True):
    """There are no more turns."""


class Diverged(Exception):
    """This rank has done something else than the leader."""


_TURNS: Codec[Turn | Stop] = Codec(Turn | Stop)


class Leader:
    """Rank 0's side. Sockets are bound below ``meeting_place``, a path that is this start's own."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], meeting_place: str, size: int) -> None:
        self._sockets = [_socket(context, zmq.PUSH) for _ in range(1, size)]
        for rank, socket in enumerate(self._sockets, start=1):
            socket.bind(_address(meeting_place, rank))

    def tell(self, turn: Turn | Stop) -> None:
        frames = _TURNS.encode(turn)
        for socket in self._sockets:
            socket.send_multipart(frames, copy=False)


class Follower:
    """The side of every other rank."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], meeting_place: str, rank: int) -> None:
        self._socket = _socket(context, zmq.PULL)
        self._socket.connect(_address(meeting_place, rank))

    def run(self, trace: Callable[[], int], take: Callable[[Turn], None]) -> None:
        """Take turns until there are no more. Raises ``Diverged`` when this rank's ``trace`` is not the leader's."""
        while isinstance(turn := _TURNS.decode(self._socket.recv_multipart()), Turn):
            if trace() != turn.trace:
                raise Diverged("this rank's forwards are not the leader's")
            take(turn)


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.linger = 500
    return socket


def _address(meeting_place: str, rank: int) -> str:
    return f"ipc://{meeting_place}-rank-{rank}"
