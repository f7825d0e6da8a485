"""The unions of messages between server, scheduler and worker.

The life of one request in messages::

    server ──Generate──▶ scheduler ──Generate──▶ worker
    server ◀──Queued, Started, Progress, Preview if asked for, then Result or Failed── (in this order)
    server ──Cancel──▶ scheduler ──Cancel──▶ worker
"""

from __future__ import annotations

from .codec import Codec
from .generation import Cancel, Failed, Generate, GenerateCopies, Preview, Progress, Queued, Result, Started
from .operations import AbortRequests, Continue, ListAdapters, Operate, Pause, Perform, SetPaused
from .replicas import Heartbeat, ReplicaExited, ReplicaFailed, ReplicaLoading, ReplicaReady, Status
from .reports import Operated, Performed

ToScheduler = (
    Generate | GenerateCopies | Cancel | ReplicaExited | Operate | Pause | Continue | AbortRequests | ListAdapters
)
FromScheduler = Queued | Started | Progress | Preview | Result | Failed | Operated | Status
ToWorker = Generate | Cancel | Perform | SetPaused
FromWorker = (
    ReplicaLoading | ReplicaReady | ReplicaFailed | Heartbeat | Progress | Preview | Result | Failed | Performed
)

TO_SCHEDULER: Codec[ToScheduler] = Codec(ToScheduler)
FROM_SCHEDULER: Codec[FromScheduler] = Codec(FromScheduler)
TO_WORKER: Codec[ToWorker] = Codec(ToWorker)
FROM_WORKER: Codec[FromWorker] = Codec(FromWorker)
