"""Admission: whether a request may wait for a replica."""

from __future__ import annotations

import math
from collections import deque

from ..protocol.config import Config
from ..protocol.errors import Conflict, InvalidRequest, QueueFull, SafelightError, Unavailable
from ..protocol.generation import Generate
from .cost import refusal_of
from .replica_sync import ReplicaSync
from .replicas import Replicas
from .requests import Requests

RETRY_UNAVAILABLE_S = 5.0
"""When to ask again while no replica is ready: a worker needs seconds to load."""

REMEMBERED_DURATIONS = 32


def asleep() -> Conflict:
    return Conflict("The server is asleep; wake it with POST /resume_memory_occupation.")


class Admission:
    def __init__(self, config: Config, replicas: Replicas, sync: ReplicaSync, requests: Requests) -> None:
        self._config = config
        self._replicas = replicas
        self._sync = sync
        self._requests = requests
        self._durations: deque[float] = deque(maxlen=REMEMBERED_DURATIONS)

    def took(self, seconds: float) -> None:
        """A replica has worked on a request for so long."""
        self._durations.append(seconds)

    def no_replica(self, pinned_to: int | None = None) -> Unavailable:
        what = "No replica" if pinned_to is None else f"Replica {pinned_to}, which the request is for,"
        verb = "is" if pinned_to is None else "is not"
        return Unavailable(f"{what} {verb} ready: {self._replicas.reasons()}.", retry_after_s=RETRY_UNAVAILABLE_S)

    def refusal_of(self, generate: Generate, nbytes: int) -> SafelightError | None:
        """Why ``generate`` cannot be accepted."""
        request_id, timeout_s = generate.request_id, generate.timeout_s
        if self._requests.get(request_id) or self._replicas.have(request_id):
            return InvalidRequest(f"The request id {request_id!r} is in use by another request.", field="request_id")
        if not generate.samples:
            return InvalidRequest("The request asks for no output; ask for at least one.", field="samples")
        if timeout_s is not None and not timeout_s > 0:  # NaN too, which no order could hold
            return InvalidRequest(f"timeout_s is {timeout_s}; it must be more than 0 seconds.", field="timeout_s")
        if self._sync.asleep:
            return asleep()
        if not self._replicas.ready:
            return self.no_replica()
        return refusal_of(generate, self._replicas, self._config) or self._no_room(nbytes)

    def _no_room(self, nbytes: int) -> QueueFull | None:
        """Why a request of so many bytes, with all its copies, may not wait; the first one always may."""
        waiting, waiting_bytes = self._requests.waiting_count, self._requests.waiting_bytes()
        if waiting >= self._config.max_queue:
            full = f"{waiting} requests wait already, and no more may (--max-queue)."
        elif waiting and waiting_bytes + nbytes > self._config.max_queue_mb * 2**20:
            waiting_mb, max_mb = waiting_bytes >> 20, self._config.max_queue_mb
            full = f"Requests of {waiting_mb} MB wait already, and {max_mb} MB may (--max-queue-mb)."
        else:
            return None
        retry_after_s = self._retry_after_s()
        return QueueFull(f"{full} Ask again in {retry_after_s:.0f} s.", retry_after_s=retry_after_s)

    def _retry_after_s(self) -> float:
        """A recent request's mean seconds on a replica: by then, all that runs now has made room in the queue."""
        mean = sum(self._durations) / len(self._durations) if self._durations else 1.0
        return float(max(1, math.ceil(mean)))
