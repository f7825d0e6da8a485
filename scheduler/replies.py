"""Replies to clients that asked for an operation."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ..protocol.errors import SafelightError
from ..protocol.generation import Failed
from ..protocol.operations import Operate
from ..protocol.reports import Operated, Report
from .barrier_queue import BarrierQueue
from .outbox import Outbox
from .replica_sync import ReplicaSync
from .replicas import Replicas

logger = logging.getLogger(__name__)


class Replies:
    def __init__(self, replicas: Replicas, sync: ReplicaSync, queue: BarrierQueue, outbox: Outbox) -> None:
        self._replicas = replicas
        self._sync = sync
        self._queue = queue
        self._outbox = outbox

    def done(self, part: Operate, reports: Mapping[int, Report] | None = None) -> None:
        """Answer with each replica's report, and say why no replica can serve, if none can or is being caught up."""
        if not part.request_id:  # an internal operation
            return
        committed = self._sync.committed
        catching_up = any(transaction.target is not None for transaction in self._queue.transactions())
        unable = None if self._replicas.ready or catching_up else self._replicas.reasons()
        answer = Operated(
            part.request_id,
            dict(sorted((reports or {}).items())),
            committed.version,
            sorted(self._sync.asleep),
            committed.adapters,
            unable,
        )
        self._outbox.tell_server(answer)

    def at_once(self, request_id: str) -> None:
        """Answer what no replica reports on."""
        committed = self._sync.committed
        asleep = sorted(self._sync.asleep)
        self._outbox.tell_server(Operated(request_id, {}, committed.version, asleep, committed.adapters))

    def failed(self, part: Operate, error: SafelightError, report: Report | None = None) -> None:
        if part.request_id:
            self._outbox.tell_server(Failed(part.request_id, error.info(), report))
        else:
            logger.error("%s failed: %s", type(part.operation).__name__, error.message)
