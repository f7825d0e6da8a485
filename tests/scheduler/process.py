"""The real scheduler process, and peers of it that the test plays, over real sockets."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec
import zmq

from safelight.protocol.child_config import ChildConfig
from safelight.protocol.codec import Codec
from safelight.protocol.config import Config
from safelight.protocol.generation import Cancel
from safelight.protocol.messages import (
    FROM_SCHEDULER,
    FROM_WORKER,
    TO_SCHEDULER,
    TO_WORKER,
    FromScheduler,
    FromWorker,
    ToScheduler,
    ToWorker,
)
from safelight.protocol.replicas import ReplicaReady, Status
from safelight.tests.forked import Forked
from safelight.tests.scheduler.stage import MODEL

M = TypeVar("M")
Sent = TypeVar("Sent")
Received = TypeVar("Received")

PATIENCE_S = 20.0
"""Seconds that a test waits for a message: far longer than it takes, so that a slow machine does not fail it."""


class Peer(Generic[Sent, Received]):
    """A DEALER that sends and receives messages of one side."""

    def __init__(
        self, address: str, sends: Codec[Sent], receives: Codec[Received], identity: bytes | None = None
    ) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvtimeo = int(PATIENCE_S * 1000)
        if identity is not None:
            self.socket.setsockopt(zmq.IDENTITY, identity)
        self.socket.connect(address)
        self._sends, self._receives = sends, receives

    def send(self, *messages: Sent) -> None:
        for message in messages:
            self.socket.send_multipart(self._sends.encode(message))

    def send_frames(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def receive(self) -> Received:
        """The next message. Raises ``zmq.Again`` when none comes."""
        return self._receives.decode(self.socket.recv_multipart())

    def expect(self, kind: type[M], where: Callable[[M], bool] = lambda message: True) -> M:
        """The next message of one kind for which ``where`` holds, after any number of others."""
        give_up = time.monotonic() + PATIENCE_S
        while not (isinstance(message := self.receive(), kind) and where(message)):
            assert time.monotonic() < give_up, f"no such {kind.__name__} came"
        return message

    def close(self) -> None:
        self._context.destroy(linger=0)


class Scheduler:
    """A running ``python -m safelight.scheduler`` and the directory of its sockets."""

    def __init__(self, config: Config, directory: str | None = None) -> None:
        # mkdtemp's directories have mode 0700, and are short: a socket's path has a limit.
        self.directory = directory or tempfile.mkdtemp(prefix="safelight-")
        self.child = ChildConfig(config=config, directory=self.directory)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process
        self._peers: list[Peer[Any, Any]] = []
        self.process = Forked("safelight.scheduler.__main__:main", text=False, stdin=subprocess.PIPE, stderr=self._log)
        assert self.process.stdin is not None
        self.launcher_pipe = self.process.stdin
        self.launcher_pipe.write(msgspec.json.encode(self.child) + b"\n")
        self.launcher_pipe.flush()

    def server(self) -> Peer[ToScheduler, FromScheduler]:
        """A server that has said hello and knows that it was heard."""
        server = Peer(self.child.frontend, TO_SCHEDULER, FROM_SCHEDULER)
        self._peers.append(server)
        server.send(Cancel(""))
        server.expect(Status)
        return server

    def worker(self, identity: bytes = b"replica-0") -> Peer[FromWorker, ToWorker]:
        worker = Peer(self.child.backend, FROM_WORKER, TO_WORKER, identity)
        self._peers.append(worker)
        return worker

    def ready_worker(self, server: Peer[ToScheduler, FromScheduler], pid: int = 10) -> Peer[FromWorker, ToWorker]:
        """Replica 0's worker, and the server knows that it is ready."""
        worker = self.worker()
        worker.send(ReplicaReady(0, pid, MODEL))
        server.expect(Status, lambda status: status.replicas[0].pid == pid)
        return worker

    def log(self) -> str:
        """The scheduler's log so far."""
        return os.pread(self._log.fileno(), 1 << 20, 0).decode()

    def close(self) -> None:
        for peer in self._peers:
            peer.close()
        self.process.kill()
        self.process.wait()
        self.launcher_pipe.close()
        self._log.close()
        shutil.rmtree(self.directory, ignore_errors=True)
