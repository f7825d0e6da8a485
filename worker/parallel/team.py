"""The leader of a replica tells its other ranks what to do, so that all do the same in the same order.

Each turn goes as one message from rank 0 to every other, and is followed by the name of the group of calls that the
leader's next forward is for, where it makes one. A rank that would make another forward, or none, must not go on, since
its next collective would meet another one.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import zmq

from ...protocol.codec import Codec
from ...protocol.generation import Cancel, Generate
from ...protocol.operations import Perform, SetPaused


class SettleJoin(msgspec.Struct, tag=True, frozen=True):
    """The leader's own: see how far every rank is with the join that was ordered as ``number``; ``late`` ends it."""

    number: int
    late: bool


class Turn(msgspec.Struct, tag=True, frozen=True):
    """What happens before the next forward: requests that start or end, and ones that have failed on the leader."""

    messages: list[Generate | Cancel | Perform | SetPaused | SettleJoin]
    dropped: list[str]


class Group(msgspec.Struct, tag=True, frozen=True):
    """The forward that the leader is about to make, by its :attr:`..batcher.Batcher.schedule_digest`."""

    digest: int


class Stop(msgspec.Struct, tag=True, frozen=True):
    """There are no more turns."""


class Diverged(Exception):
    """This rank would do something else than the leader."""


_MESSAGES: Codec[Turn | Group | Stop] = Codec(Turn | Group | Stop)


class Leader:
    """Rank 0's side. Sockets are bound below ``meeting_place``, a path that is this start's own."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], meeting_place: str, size: int) -> None:
        self._sockets = [_socket(context, zmq.PUSH) for _ in range(1, size)]
        for rank, socket in enumerate(self._sockets, start=1):
            socket.bind(_address(meeting_place, rank))

    def tell(self, message: Turn | Group | Stop) -> None:
        if not self._sockets:
            return
        frames = _MESSAGES.encode(message)
        for socket in self._sockets:
            socket.send_multipart(frames, copy=False)

    def meet(self, digest: int) -> None:
        """Before a forward: name its group to the other ranks."""
        self.tell(Group(digest))


class Follower:
    """The side of every other rank."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], meeting_place: str, rank: int) -> None:
        self._socket = _socket(context, zmq.PULL)
        self._socket.connect(_address(meeting_place, rank))

    def run(self, take: Callable[[Turn], None]) -> None:
        """Take turns until there are no more. Raises ``Diverged`` where the leader makes a forward that nobody met."""
        while isinstance(message := self._next(), Turn):
            take(message)
        if isinstance(message, Group):
            raise Diverged("the leader makes a forward, and this rank has none to make")

    def meet(self, digest: int) -> None:
        """Before a forward: raises ``Diverged`` unless the leader makes the same one."""
        message = self._next()
        if not isinstance(message, Group):
            raise Diverged("this rank has a forward to make, and the leader makes none")
        if message.digest != digest:
            raise Diverged("this rank's forward is for other calls than the leader's")

    def _next(self) -> Turn | Group | Stop:
        return _MESSAGES.decode(self._socket.recv_multipart())


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.linger = 500
    return socket


def _address(meeting_place: str, rank: int) -> str:
    return f"ipc://{meeting_place}-rank-{rank}"
