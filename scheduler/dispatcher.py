"""Decides who runs, and when: dispatch, cancellation, deadlines, and the requests of a lost replica.

It decides from messages and an explicit ``now`` (seconds of one monotonic clock), without a socket, and leaves messages
in an outbox. Three things hold after each event:

- an accepted request, or each of its copies, gets exactly one of ``Result`` and ``Failed``, after ``Queued`` and
  ``Started`` if it asks for progress;
- a request waits only while some replica is ready that may run it, so nobody waits for a restart;
- a replica's outstanding outputs are those that its worker has not answered for yet.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from msgspec.structs import replace

from ..protocol.adapters import SetAdapters
from ..protocol.config import Config
from ..protocol.errors import ClientGone, Conflict, DeadlinePassed, SafelightError, Unavailable
from ..protocol.generation import Cancel, Failed, Generate, GenerateCopies, Preview, Progress, Queued, Result, Started
from ..protocol.messages import FromWorker, ToScheduler
from ..protocol.operations import AbortRequests, Continue, ListAdapters, Operate, Pause
from ..protocol.replicas import Heartbeat, ReplicaExited, ReplicaFailed, ReplicaLoading, ReplicaReady, Status
from ..protocol.reports import Performed
from .admission import RETRY_UNAVAILABLE_S, Admission, asleep
from .backlog import Backlog, nbytes_of
from .barrier_queue import BarrierQueue
from .catch_up import CatchUp
from .committed import CommittedState
from .driver import Driver
from .groups import GroupOperations
from .operations import Operations
from .outbox import Messages, Outbox
from .pauses import Pauses
from .recent_adapters import RecentAdapters
from .replica_sync import ReplicaSync
from .replicas import Replica, Replicas
from .replies import Replies
from .request import Request
from .requests import Requests
from .statuses import Statuses
from .steps import Steps

logger = logging.getLogger(__name__)


class Dispatcher:
    """Owns every request and every replica's state."""

    def __init__(self, config: Config, adapters: SetAdapters | None = None) -> None:
        """``adapters`` are what replicas begin with."""
        self.heard = 0
        """Messages of the server that have come."""
        self._config = config
        self._outbox = Outbox()
        self._replicas = Replicas(config.replicas)
        barrier_queue = BarrierQueue()
        self._requests = Requests(config, barrier_queue)
        committed = CommittedState(initial_adapters=adapters)
        self._sync = ReplicaSync(self._replicas, committed, journal=config.weights_journal is not None)
        self._recent = RecentAdapters(self._requests)
        self._replies = Replies(self._replicas, self._sync, barrier_queue, self._outbox)
        self._admission = Admission(config, self._replicas, self._sync, self._requests)
        self._pauses = Pauses(self._replicas, self._replies, self._outbox, self._end_all)
        groups, catch_up = (
            GroupOperations(self._replicas, self._outbox, self._replies),
            CatchUp(self._sync, barrier_queue),
        )
        steps = Steps(self._replicas, self._sync, catch_up, groups, self._outbox, self._replies, self._recent)
        driver = Driver(
            barrier_queue, steps, catch_up, groups, self._outbox,
            config.max_update_hold_s, self._resume, self._end_all, self._drained,
        )  # fmt: skip
        self._operations = Operations(
            self._sync, barrier_queue, self._replies, Backlog(config), groups, catch_up, driver
        )
        self._statuses = Statuses(self._replicas, self._sync, self._requests, self._pauses, self._operations)

    def take_outbox(self) -> Messages:
        return self._outbox.take()

    def greet(self) -> None:
        """A server has connected: tell it the status at the next turn."""
        self._statuses.is_due()

    def next_turn(self) -> float:
        """When :meth:`turn` has something to do if nothing happens before."""
        first = self._requests.next_to_expire
        due = min(self._statuses.due, self._operations.next_turn)
        return min(due, first.deadline) if first else due

    def turn(self, now: float) -> None:
        """Do what time alone makes due, and report changes of state."""
        self._replicas.check_stalls(now, self._config)
        self._settle(now)
        if (status := self._statuses.next(now, self.heard)) is not None:
            # before the answer to what changed it: who has the answer and asks again hears of the change
            self._outbox.tell_server_first(status)

    def status(self, now: float) -> Status:
        return self._statuses.status(now, self.heard)

    def from_server(self, message: ToScheduler, now: float) -> None:
        match message:
            case Generate():
                self._admit(message, [None], now)
            case GenerateCopies(request=request, replicas=replicas):
                self._admit(request, replicas, now)
            case Cancel(request_id=request_id):
                for copy in self._requests.get(request_id):
                    self._stop(copy, ClientGone("The client went away."))
                self._operations.cancel(request_id)
            case Operate():
                self._operations.add(message, now)
            case Pause():
                self._pauses.pause(message)
            case Continue(request_id=request_id):
                self._pauses.resume(request_id)
            case AbortRequests(request_id=request_id, name=name, exact=exact):
                self._abort(name, exact)
                self._replies.at_once(request_id)
            case ListAdapters(request_id=request_id):
                self._replies.at_once(request_id)
            case ReplicaExited(replica=number, message=why):
                if replica := self._replicas.get(number):
                    self._lose(replica, replica.exited(why), f"was lost ({why}) and will come back")
                    if replica.is_gone:  # else it was an earlier process, which had been missed before
                        self._operations.lost(replica, now)
        self._settle(now)

    def from_worker(self, number: int, message: FromWorker, now: float) -> None:
        """Handle what the worker of replica ``number`` sent."""
        replica = self._replicas.get(number)
        if replica is None or not _speaks_for(number, message):
            logger.warning("dropped %s: replica %d may not send it", type(message).__name__, number)
            return
        match message:
            case ReplicaLoading() | ReplicaReady() | ReplicaFailed():
                self._replica_changes(replica, message, now)
            case Heartbeat():
                replica.heartbeat(message, now)
            case Progress() | Preview():
                if self._requests.running_on(number, message.request_id):
                    self._outbox.tell_server(message)
            case Result() | Failed():
                self._answer(replica, message, now)
            case Performed():
                self._operations.answered(number, message, now)
        if isinstance(message, Result | Preview):  # from threads that go on when the worker's loop hangs
            replica.lives(now)
        elif not isinstance(message, Heartbeat):
            replica.spoke(now)
        self._settle(now)

    def _replica_changes(
        self, replica: Replica, message: ReplicaLoading | ReplicaReady | ReplicaFailed, now: float
    ) -> None:
        match message:
            case ReplicaLoading(pid=pid, stage=stage):
                again = replica.follows_another(pid)
                self._lose(replica, replica.loading(pid, stage, now), "was lost and is starting again")
                if again:
                    self._operations.lost(replica, now)
            case ReplicaReady(pid=pid, model=model):
                if replica.follows_another(pid):  # that one's end may let the next operation begin, without this one
                    self._lose(replica, replica.loading(pid, "loaded", now), "was lost and has come back")
                    self._operations.lost(replica, now)
                self._lose(replica, replica.ready(pid, model, now), "was lost and has come back")
                if replica.state == "ready":  # these are not the last words of a process that is gone
                    self._pauses.started(replica)
                    self._operations.joined(replica, now)
            case ReplicaFailed(message=why):
                self._lose(replica, replica.failed(why), f"failed ({why})")

    def _admit(self, generate: Generate, replicas: Sequence[int | None], now: float) -> None:
        """Accept a request, with a copy for each of ``replicas``; none is started before all are accepted."""
        nbytes = nbytes_of(generate)
        refusal = self._admission.refusal_of(generate, nbytes * len(replicas))
        for number in replicas:
            if refusal is not None:
                self._outbox.tell_server(Failed(generate.request_id, refusal.info()))
            else:
                behind = self._operations.blocks
                ahead = self._requests.accept(generate, nbytes, now, pinned_to=number, behind=behind)
                if generate.progress:
                    self._outbox.tell_server(Queued(generate.request_id, ahead))

    def _settle(self, now: float) -> None:
        """Bring the requests in line with the time and with the replicas."""
        while (first := self._requests.next_to_expire) and first.deadline <= now:
            self._expire(first, now)
        self._fail_those_without_replica()
        self._operations.advance(now)
        self._pauses.answer()
        if self._operations.lets_run and self._statuses.halted is None:
            self._dispatch(now)

    def _fail_those_without_replica(self) -> None:
        ready = self._replicas.ready
        for request in self._requests.without_replica(ready):
            self._fail(request, self._admission.no_replica(request.pinned_to if ready else None))

    def _dispatch(self, now: float) -> None:
        """Give each request in the queue to the least loaded replica, or to its own.

        Nobody behind may pass a request that does not fit, else small requests would keep a large one out for ever. One
        that is pinned to a replica holds back only what would go to that replica.
        """
        held: set[int] = set()
        for request in self._requests.queue:
            pinned_to = request.pinned_to
            if pinned_to in held:
                continue
            replica = self._replicas.least_loaded(pinned_to, without=held)
            if replica is not None and replica.has_room(request.outputs, self._config.max_running):
                self._start(request, replica, now)
            elif pinned_to is None:
                return
            else:
                held.add(pinned_to)

    def _start(self, request: Request, replica: Replica, now: float) -> None:
        self._requests.start(request, replica.number, now)
        replica.assign(request.id, request.outputs)
        if request.generate.progress:
            self._outbox.tell_server(Started(request.id, replica.number, request.queue_s(now)))
        self._outbox.order(replica.number, request.generate)
        self._recent.used((use.name for use in request.generate.lora or ()), self._sync.committed.adapters.loaded)

    def _answer(self, replica: Replica, message: Result | Failed, now: float) -> None:
        """A worker is done with a request: make room, and forward the answer unless the server has one already."""
        replica.release(message.request_id)
        request = self._requests.running_on(replica.number, message.request_id)
        if request is None:
            return
        if isinstance(message, Result):
            queue_s = request.queue_s(now)
            self._admission.took(now - request.arrived - queue_s)
            timings = replace(message.timings, queue_s=queue_s, total_s=queue_s + message.timings.total_s)
            message = replace(message, timings=timings)
        self._requests.remove(request)
        self._outbox.tell_server(message)

    def _expire(self, request: Request, now: float) -> None:
        queue_s, total_s = request.queue_s(now), request.deadline - request.arrived
        where = "waiting" if request.replica is None else f"after {queue_s:.1f} s of waiting"
        self._stop(request, DeadlinePassed(f"The request's {total_s:g} s ran out {where}. Give it a longer timeout_s."))

    def _stop(self, request: Request, error: SafelightError) -> None:
        """Fail ``request`` now. A worker that has it holds it until it answers the ``Cancel``."""
        if request.replica is not None:
            self._outbox.order(request.replica, Cancel(request.id))
        self._fail(request, error)

    def _lose(self, replica: Replica, request_ids: list[str], how: str) -> None:
        """Fail the requests that were lost with a replica's process; some of them had an answer before."""
        for request_id in request_ids:
            if request := self._requests.running_on(replica.number, request_id):
                message = f"Replica {replica.number}, which worked on this request, {how}. Send the request again."
                self._fail(request, Unavailable(message, retry_after_s=RETRY_UNAVAILABLE_S))

    def _fail(self, request: Request, error: SafelightError) -> None:
        self._requests.remove(request)
        self._outbox.tell_server(Failed(request.id, error.info()))

    def _resume(self, request: Request) -> None:
        """An operation is done, and what was queued behind it waits like any other."""
        self._requests.queue.add(request)
        if self._sync.asleep:
            self._fail(request, asleep())

    def _drained(self) -> bool:
        """Return whether all accepted requests have ended, except those that may not start now."""
        if self._pauses.stops_forwards:
            return True
        waiting = len(self._requests.queue) if self._statuses.halted is None else 0
        return waiting == 0 and self._replicas.are_idle

    def _end_all(self, error: SafelightError) -> None:
        """End all requests but those that are queued behind an operation."""
        for request in self._requests.not_queued_behind():
            self._stop(request, error)

    def _abort(self, name: str | None, exact: bool) -> None:
        for request in self._requests:
            if name is None or request.is_named(name, exact=exact):
                self._stop(request, Conflict("The request was aborted by an operator."))


def _speaks_for(number: int, message: FromWorker) -> bool:
    """Return whether a message that names a replica names the one whose socket it came from."""
    match message:
        case ReplicaLoading() | ReplicaReady() | ReplicaFailed() | Heartbeat():
            return message.replica == number
        case _:
            return True
