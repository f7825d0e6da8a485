"""A replica's process: it loads, tests itself, and then turns the hub between messages."""

from __future__ import annotations

import logging
import os
import signal
import time

import torch
import zmq

from ..protocol.config import ChildConfig
from ..protocol.errors import StartFailed
from ..protocol.messages import (
    FROM_WORKER,
    TO_WORKER,
    Cancel,
    FromWorker,
    Generate,
    Heartbeat,
    ReplicaFailed,
    ReplicaLoading,
    ReplicaReady,
)
from .hub import Hub
from .jobs import Jobs
from .model import Model, load_model
from .prompt_cache import PromptCache
from .self_test import SelfTest, Verdict

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0


class Replica:
    """One worker process. ``replica`` of ``child`` is its number."""

    def __init__(self, child: ChildConfig) -> None:
        assert child.replica is not None
        self._config = child.config
        self._number = child.replica
        self._stopping = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.identity = f"replica-{self._number}".encode()
        self._socket.sndhwm = 0
        self._socket.rcvhwm = 0
        self._socket.linger = 500
        self._socket.connect(child.backend)
        self._awake, self._alarm = os.pipe()
        os.set_blocking(self._alarm, False)

    def run(self) -> int:
        """Load and serve until SIGTERM. Returns the process's exit status."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            model, verdict = self._load()
        except StartFailed as failed:
            self._send(ReplicaFailed(self._number, failed.message))
            return self._leave(1)
        hub = Hub(
            max_batch=self._config.max_batch,
            max_tokens=self._config.max_batch_tokens,
            mode=verdict.batching.mode,
            cache=PromptCache(self._config.prompt_cache_mb * 2**20) if self._config.prompt_cache_mb else None,
        )
        hub.unmergeable.update(verdict.unmergeable)
        jobs = Jobs(model, hub, self._send, self._wake)
        info = model.info(verdict.batching, verdict.supports_preview)
        self._send(ReplicaReady(self._number, os.getpid(), info))
        try:
            self._serve(hub, jobs)
        finally:
            jobs.close()  # also after a fault: what waits to be encoded must not hold up the end
        return self._leave(0)

    def _load(self) -> tuple[Model, Verdict]:
        threads = self._config.threads or max(1, (os.cpu_count() or 1) // self._config.replicas)
        torch.set_num_threads(threads)
        # gradient mode is the thread's: set once here, so that no pipeline's no_grad can switch it on on leaving
        torch.set_grad_enabled(False)
        self._report("loading the model")
        model = load_model(self._config)
        return model, SelfTest(model, self._config, self._report).run()

    def _serve(self, hub: Hub, jobs: Jobs) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._awake, zmq.POLLIN)
        beat_at = time.monotonic()
        while not self._stopping:
            now = time.monotonic()
            if now >= beat_at:
                self._send(Heartbeat(self._number, jobs.stats()))
                beat_at = now + HEARTBEAT_S
            ready = dict(poller.poll(0 if hub.busy else round((beat_at - now) * 1000)))
            if self._awake in ready:
                os.read(self._awake, 4096)
            if self._socket in ready:
                self._receive(jobs)
            jobs.collect()
            hub.turn()

    def _receive(self, jobs: Jobs) -> None:
        """Take in every message that has arrived."""
        while self._socket.poll(0):
            message = TO_WORKER.decode(self._socket.recv_multipart())
            match message:
                case Generate():
                    jobs.submit(message)
                case Cancel():
                    jobs.cancel(message.request_id)

    def _send(self, message: FromWorker) -> None:
        self._socket.send_multipart(FROM_WORKER.encode(message), copy=False)

    def _report(self, stage: str) -> None:
        log.info("%s", stage)
        self._send(ReplicaLoading(self._number, os.getpid(), stage))

    def _wake(self) -> None:
        """Called by encoding threads; a full pipe means that the loop is about to wake anyway."""
        try:
            os.write(self._alarm, b"\0")
        except BlockingIOError:
            return

    def _stop(self, *_: object) -> None:
        self._stopping = True
        self._wake()

    def _leave(self, status: int) -> int:
        self._context.destroy(linger=500)
        return status
