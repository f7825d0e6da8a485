"""Statuses for the server: about every second, and at once when operations or replicas change them."""

from __future__ import annotations

import math

from ..protocol.replicas import Status
from .operations import Operations
from .pauses import Pauses
from .replica_sync import ReplicaSync
from .replicas import Replicas
from .requests import Requests

STATUS_INTERVAL_S = 1.0


class Statuses:
    def __init__(
        self, replicas: Replicas, sync: ReplicaSync, requests: Requests, pauses: Pauses, operations: Operations
    ) -> None:
        self.due = -math.inf
        """When the next status is due."""
        self._replicas = replicas
        self._sync = sync
        self._requests = requests
        self._pauses = pauses
        self._operations = operations
        self._halted_before: str | None = None
        self._halted_at = 0.0
        self._pushed = self._watched()

    def is_due(self) -> None:
        self.due = -math.inf

    @property
    def halted(self) -> str | None:
        """Why no request is started, though replicas are ready."""
        if self._sync.asleep:
            return "asleep"
        return "paused" if self._pauses.mode else None

    def next(self, now: float, heard: int) -> Status | None:
        """The next status, if it is due."""
        watched = self._watched()
        if now < self.due and watched == self._pushed:
            return None
        self._pushed, self.due = watched, now + STATUS_INTERVAL_S
        return self.status(now, heard)

    def _watched(self) -> tuple[object, ...]:
        """The part of the status that is pushed when it changes."""
        adapters = self._sync.committed.adapters
        return self._replicas.states(), self.halted, adapters, self._operations.session_id

    def status(self, now: float, heard: int) -> Status:
        waiting, halted = self._requests.waiting_count, self.halted
        if halted != self._halted_before:
            self._halted_before, self._halted_at = halted, now
        return Status(
            queued=waiting,
            running=len(self._requests) - waiting,
            replicas=self._replicas.status(),
            halted=halted,
            halted_s=0.0 if halted is None else now - self._halted_at,
            hold=self._operations.hold_at(now),
            queued_operations=len(self._operations.waiting()),
            queued_bytes=self._requests.waiting_bytes() + self._operations.waiting_bytes(),
            adapters=self._sync.committed.adapters,
            heard=heard,
        )
