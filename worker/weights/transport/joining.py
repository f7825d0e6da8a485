"""Joins a trainer's process group in a thread of its own, while the rank keeps serving.

torch bounds most of its waits, but not all: it waits forever for a store that accepts a connection and then stays
silent. An abandoned join therefore loses its connections to the store, also torch's retries, until its thread ends.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from ....protocol.operations import Join

SENDER = 0
"""The trainer's rank in the group."""

LATE_S = 5.0
"""Seconds between torch's own timeout and ours. For NCCL ours expires first, because its watchdog may end the process.
For gloo ours expires last, because only gloo's own timeout can end a pending broadcast.
"""

_TRY_S = 2.0
"""Seconds within which torch retries a connection by itself."""

_AGAIN_S = 0.2

Peer = tuple[str, int]


class Attempt:
    """One join as ``rank``, after ``others``: abandoned joins whose connections to the same store may still be cut.

    ``ended`` is called from the thread when the join has succeeded or failed.
    """

    def __init__(self, asked: Join, rank: int, ended: Callable[[], None], others: Sequence[Attempt] = ()) -> None:
        assert SENDER < rank < asked.world_size, "the server has validated the ranks"
        self.asked = asked
        self.deadline = time.monotonic() + asked.timeout_s
        self.error: str | None = None
        self._rank = rank
        self._ended = ended
        self._others = others
        self._backend: Any = None
        self._peer: Peer | None = None
        self._not_ours: set[str] = set()
        self._given_up = False
        self._hand_over = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"join-{rank}", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """True if the join has ended; it has failed if :attr:`error` is set."""
        return self._backend is not None or self.error is not None

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def wait(self, deadline: float) -> None:
        """Wait until the thread has ended, at most until ``deadline``."""
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def take(self) -> Any:
        """The backend of the joined group."""
        assert self._backend is not None, "the join has succeeded"
        return self._backend

    def give_up(self) -> None:
        """Abandon the join. Returns at once."""
        with self._hand_over:
            self._given_up = True
            backend, self._backend = self._backend, None
        if backend is not None:
            backend.abort()
        elif self.is_alive:
            threading.Thread(target=self._cut_until_ended, name=f"cut-{self._rank}", daemon=True).start()

    def _cut_until_ended(self) -> None:
        while self.is_alive:
            if self._peer is not None:
                _cut(self._peer, self._not_ours)
            self._thread.join(_AGAIN_S)

    def _run(self) -> None:
        try:
            self._keep(self._meet())
        except (RuntimeError, ValueError, OSError) as error:
            self.error = first_line(error)
        self._ended()

    def _keep(self, backend: Any) -> None:
        with self._hand_over:
            if not self._given_up:
                self._backend = backend
                return
        backend.abort()

    def _meet(self) -> Any:
        """Join the group and return when all members have. The keys in the store are those of torch's own groups.

        Over NCCL it returns when the store answers: members meet there in their first collective.

        Raises ``RuntimeError`` if the others do not join, and ``OSError`` for an invalid address.
        """
        asked, timeout = self.asked, timedelta(seconds=self.asked.timeout_s)
        address, own = _resolved(asked.address, asked.port)
        for other in self._others:
            other.wait(self.deadline)
        self._not_ours = {inode for _, inode in _connections((address, asked.port))}
        self._peer = address, asked.port
        store = self._store(*self._peer)
        store.set_timeout(timeout)
        named = PrefixStore(f"{asked.group}/", PrefixStore(asked.group, store))
        if asked.backend == "nccl":
            from torch.distributed import ProcessGroupNCCL  # not in a build without CUDA

            # read when the group is made, so it holds for this group alone: a timeout then aborts its communicator
            # (by default it ends the process). A replica's own ranks keep the default.
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "2"
            nccl = ProcessGroupNCCL.Options()
            nccl._timeout = timeout + timedelta(seconds=LATE_S)
            return ProcessGroupNCCL(PrefixStore("cuda/", named), self._rank, asked.world_size, nccl)
        gloo = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # not declared by torch
        gloo._timeout = timeout
        # not GLOO_SOCKET_IFNAME's interface, because the trainer may be on another machine
        gloo._devices = [ProcessGroupGloo.create_device(hostname=own)]
        return ProcessGroupGloo(PrefixStore("cpu/", named), self._rank, asked.world_size, gloo)

    def _store(self, address: str, port: int) -> TCPStore:
        """Connect, with retries until the deadline. Raises ``RuntimeError``."""
        while True:
            left_s = max(0.001, min(_TRY_S, self.deadline - time.monotonic()))
            try:
                return TCPStore(
                    address, port, self.asked.world_size, is_master=False, timeout=timedelta(seconds=left_s)
                )
            except RuntimeError:
                if self._given_up or time.monotonic() >= self.deadline:
                    raise


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _resolved(address: str, port: int) -> tuple[str, str]:
    """The IP address of ``address``, and this machine's own on the route to it; nothing is sent. Raises ``OSError``."""
    found = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)
    family, kind, _, _, where = min(found, key=lambda one: one[0] != socket.AF_INET)
    with socket.socket(family, kind) as probe:
        probe.connect(where)
        return str(where[0]), str(probe.getsockname()[0])


def _connections(peer: Peer) -> Iterator[tuple[socket.socket, str]]:
    """This process's connections to ``peer``, each as a duplicate descriptor and its inode."""
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # it is closed by now, or not connected
            inode = os.readlink(f"/proc/self/fd/{descriptor}")
            if not inode.startswith("socket:"):
                continue
            with socket.fromfd(int(descriptor), socket.AF_INET6, socket.SOCK_STREAM) as connection:
                match connection.getpeername():
                    case (str(address), int(port), *_) if (address.removeprefix("::ffff:"), port) == peer:
                        yield connection, inode  # torch opens IPv6 sockets, also for IPv4


def _cut(peer: Peer, others: set[str]) -> None:
    """Shut down this process's connections to ``peer``, except ``others``, so that waits on them fail."""
    for connection, inode in _connections(peer):
        if inode not in others:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
