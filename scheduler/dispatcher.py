"""Who runs, and when: admission, priority, dispatch, cancellation, deadlines, and what the loss of a replica means.

Every decision is made here, from messages and an explicit ``now`` (seconds of one monotonic clock), without a socket;
what is to be sent is left in an outbox. Three things hold after each event:

- an accepted request gets ``Queued`` and then exactly one of ``Result`` and ``Failed``;
- a request waits only while some replica is ready, so nobody waits for a restart;
- a replica's outstanding outputs are those that its worker has not answered for yet.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from dataclasses import dataclass, field

from msgspec.structs import replace

from ..protocol.adapters import SetAdapters
from ..protocol.config import Config
from ..protocol.errors import (
    ClientGone,
    Conflict,
    DeadlinePassed,
    InvalidRequest,
    QueueFull,
    SafelightError,
    Unavailable,
)
from ..protocol.generation import Cancel, Failed, Generate, Preview, Progress, Queued, Result, Started
from ..protocol.messages import FromScheduler, FromWorker, ToScheduler, ToWorker
from ..protocol.operations import AbortRequests, Barrier, Continue, ListAdapters, Operate, Pause, SetPaused
from ..protocol.replicas import Heartbeat, ReplicaExited, ReplicaFailed, ReplicaLoading, ReplicaReady, Status
from ..protocol.reports import Operated, Performed
from .backlog import nbytes_of
from .committed import Committed
from .cost import refusal_of
from .operations import Operations
from .queue import Queue, by_deadline, by_turn
from .replicas import Replica, Replicas
from .request import Request

logger = logging.getLogger(__name__)

STATUS_INTERVAL_S = 1.0

RETRY_UNAVAILABLE_S = 5.0
"""When it is worth asking again while no replica is ready: a worker needs seconds to load."""

REMEMBERED_DURATIONS = 32


@dataclass
class Outbox:
    """Messages to send, in order."""

    to_server: list[FromScheduler] = field(default_factory=list)
    to_replicas: list[tuple[int, ToWorker]] = field(default_factory=list)


class Dispatcher:
    """Owns every request and every replica's state."""

    def __init__(self, config: Config, adapters: SetAdapters | None = None) -> None:
        """``adapters`` are what replicas begin with."""
        self.heard = 0
        """Messages of the server that have come."""
        self._config = config
        self._replicas = Replicas(config.replicas)
        self._live: dict[str, Request] = {}  # accepted, and not answered yet
        self._waiting = Queue(by_turn, config.max_queue)
        self._deadlines = Queue(by_deadline)
        self._arrivals = 0
        self._durations: deque[float] = deque(maxlen=REMEMBERED_DURATIONS)
        self._paused: Barrier | None = None
        self._pausing: list[Pause] = []  # whose replies wait for what runs
        self._halted_before: str | None = None
        self._halted_at = 0.0
        self._status_due = -math.inf
        self._outbox = Outbox()
        journal = config.weights_journal is not None
        self._committed = Committed(self._replicas, journal=journal, first_adapters=adapters)
        self._operations = Operations(
            self._replicas,
            self._committed,
            lambda message: self._outbox.to_server.append(message),
            lambda number, order: self._outbox.to_replicas.append((number, order)),
            config=config,
            named=self._named_adapters,
            resume=self._resume,
            end_all=self._end_all,
            drained=self._drained,
        )
        self._pushed = self._shown()

    def take_outbox(self) -> Outbox:
        outbox, self._outbox = self._outbox, Outbox()
        return outbox

    def greet(self) -> None:
        """A server has connected: tell it the status at the next turn."""
        self._status_due = -math.inf

    def next_turn(self) -> float:
        """When :meth:`turn` has something to do if nothing happens before."""
        first = self._deadlines.first
        due = min(self._status_due, self._operations.next_turn)
        return min(due, first.deadline) if first else due

    def turn(self, now: float) -> None:
        """Do what time alone makes due, and report changes of state."""
        self._replicas.check_stalls(now, self._config)
        self._settle(now)
        shown = self._shown()
        if now >= self._status_due or shown != self._pushed:
            self._pushed, self._status_due = shown, now + STATUS_INTERVAL_S
            # before the answer to what changed it: who has the answer and asks again hears of the change
            self._outbox.to_server.insert(0, self.status(now))

    def status(self, now: float) -> Status:
        held, halted = list(self._operations.held()), self._halted()
        waiting = len(self._waiting) + len(held)
        if halted != self._halted_before:
            self._halted_before, self._halted_at = halted, now
        return Status(
            queued=waiting,
            running=len(self._live) - waiting,
            replicas=self._replicas.status(),
            halted=halted,
            halted_s=0.0 if halted is None else now - self._halted_at,
            hold=self._operations.hold_at(now),
            queued_operations=len(self._operations.waiting()),
            queued_bytes=self._waiting_bytes() + self._operations.waiting_bytes(),
            adapters=self._committed.adapters,
            heard=self.heard,
        )

    def _shown(self) -> tuple[object, ...]:
        """What operations and replicas change of the status: it is pushed at once, before the answer to the change."""
        return self._replicas.states(), self._halted(), self._committed.adapters, self._operations.holder

    def _waiting_bytes(self) -> int:
        return self._waiting.nbytes + sum(request.nbytes for request in self._operations.held())

    def from_server(self, message: ToScheduler, now: float) -> None:
        match message:
            case Generate():
                self._admit(message, now)
            case Cancel(request_id=request_id):
                if request := self._live.get(request_id):
                    self._stop(request, ClientGone("The client went away."))
                else:
                    self._operations.cancel(request_id)
            case Operate():
                self._operations.add(message, now)
            case Pause():
                self._pause(message)
            case Continue(request_id=request_id):
                self._continue(request_id)
            case AbortRequests(request_id=request_id, name=name, exact=exact):
                self._abort(name, exact)
                self._done(request_id)
            case ListAdapters(request_id=request_id):
                self._done(request_id)
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
                    if self._paused == "in_place":
                        self._outbox.to_replicas.append((number, SetPaused(True)))
                    self._operations.came(replica, now)
            case ReplicaFailed(message=why):
                self._lose(replica, replica.failed(why), f"failed ({why})")
            case Heartbeat():
                replica.heartbeat(message, now)
            case Progress() | Preview():
                if self._running_on(number, message.request_id):
                    self._outbox.to_server.append(message)
            case Result() | Failed():
                self._answer(replica, message, now)
            case Performed():
                self._operations.answered(number, message, now)
        if not isinstance(message, Heartbeat):
            replica.spoke(now)
        self._settle(now)

    def _named_adapters(self) -> set[str]:
        """By requests that are not answered yet."""
        return {use.name for request in self._live.values() for use in request.generate.lora or ()}

    def _admit(self, generate: Generate, now: float) -> None:
        nbytes = nbytes_of(generate)
        if refusal := self._refusal(generate, nbytes):
            self._outbox.to_server.append(Failed(generate.request_id, refusal.info()))
            return
        timeout_s = self._config.request_timeout_s if generate.timeout_s is None else generate.timeout_s
        request = Request(generate, self._arrivals, now, now + timeout_s, nbytes)
        self._arrivals += 1
        self._live[request.id] = request
        self._deadlines.add(request)
        waiting = len(self._waiting)
        ahead = waiting + self._operations.hold(request) if self._operations.blocks else self._waiting.add(request)
        self._outbox.to_server.append(Queued(request.id, ahead))

    def _refusal(self, generate: Generate, nbytes: int) -> SafelightError | None:
        """Why ``generate`` cannot be accepted, if it cannot."""
        request_id, timeout_s = generate.request_id, generate.timeout_s
        if request_id in self._live or self._replicas.holds(request_id):
            return InvalidRequest(f"The request id {request_id!r} is in use by another request.", field="request_id")
        if not generate.samples:
            return InvalidRequest("The request asks for no output; ask for at least one.", field="samples")
        if timeout_s is not None and not timeout_s > 0:  # NaN too, which no order could hold
            return InvalidRequest(f"timeout_s is {timeout_s}; it must be more than 0 seconds.", field="timeout_s")
        if self._operations.asleep:
            return _asleep()
        if not self._replicas.any_ready:
            return self._no_replica()
        return refusal_of(generate, self._replicas, self._config) or self._no_room(nbytes)

    def _no_room(self, nbytes: int) -> QueueFull | None:
        """Why a request of so many bytes may not wait, if it may not; the first one always may."""
        waiting = len(self._waiting) + sum(1 for _ in self._operations.held())
        if waiting >= self._config.max_queue:
            full = f"{waiting} requests wait already, and no more may (--max-queue)."
        elif waiting and self._waiting_bytes() + nbytes > self._config.max_queue_mb * 2**20:
            held_mb = self._waiting_bytes() >> 20
            full = f"Requests of {held_mb} MB wait already, and {self._config.max_queue_mb} MB may (--max-queue-mb)."
        else:
            return None
        retry_after_s = self._retry_after_s()
        return QueueFull(f"{full} Ask again in {retry_after_s:.0f} s.", retry_after_s=retry_after_s)

    def _retry_after_s(self) -> float:
        """A recent request's mean seconds on a replica: by then, all that runs now has made room in the queue."""
        mean = sum(self._durations) / len(self._durations) if self._durations else 1.0
        return float(max(1, math.ceil(mean)))

    def _no_replica(self) -> Unavailable:
        return Unavailable(f"No replica is ready: {self._replicas.reasons()}.", retry_after_s=RETRY_UNAVAILABLE_S)

    def _settle(self, now: float) -> None:
        """Bring the requests in line with the time and with the replicas."""
        while (first := self._deadlines.first) and first.deadline <= now:
            self._expire(first, now)
        if not self._replicas.any_ready:
            for request in [*self._waiting, *self._operations.held()]:
                self._fail(request, self._no_replica())
        self._operations.advance(now)
        self._answer_pauses()
        if self._operations.lets_run and self._halted() is None:
            while (first := self._waiting.first) and self._dispatch(first, now):
                pass

    def _dispatch(self, request: Request, now: float) -> bool:
        """Give the first in the queue to the least loaded replica.

        Nobody behind may pass it while it does not fit, else small requests would keep a large one out for ever.
        """
        replica = self._replicas.least_loaded()
        if replica is None or not replica.has_room(request.outputs, self._config.max_running):
            return False
        self._waiting.remove(request)
        request.start(replica.number, now)
        replica.hold(request.id, request.outputs)
        self._outbox.to_server.append(Started(request.id, replica.number, request.queue_s(now)))
        self._outbox.to_replicas.append((replica.number, request.generate))
        self._committed.used(use.name for use in request.generate.lora or ())
        return True

    def _answer(self, replica: Replica, message: Result | Failed, now: float) -> None:
        """A worker is done with a request: make room, and forward the answer unless the server has one already."""
        replica.release(message.request_id)
        request = self._running_on(replica.number, message.request_id)
        if request is None:
            return
        if isinstance(message, Result):
            queue_s = request.queue_s(now)
            self._durations.append(now - request.arrived - queue_s)
            timings = replace(message.timings, queue_s=queue_s, total_s=queue_s + message.timings.total_s)
            message = replace(message, timings=timings)
        self._forget(request)
        self._outbox.to_server.append(message)

    def _expire(self, request: Request, now: float) -> None:
        queue_s, total_s = request.queue_s(now), request.deadline - request.arrived
        where = "waiting" if request.replica is None else f"after {queue_s:.1f} s of waiting"
        self._stop(request, DeadlinePassed(f"The request's {total_s:g} s ran out {where}. Give it a longer timeout_s."))

    def _stop(self, request: Request, error: SafelightError) -> None:
        """Fail ``request`` now. A worker that has it holds it until it answers the ``Cancel``."""
        if request.replica is not None:
            self._outbox.to_replicas.append((request.replica, Cancel(request.id)))
        self._fail(request, error)

    def _lose(self, replica: Replica, request_ids: list[str], how: str) -> None:
        """Fail the requests that were lost with a replica's process; some of them had an answer before."""
        for request_id in request_ids:
            if request := self._running_on(replica.number, request_id):
                message = f"Replica {replica.number}, which worked on this request, {how}. Send the request again."
                self._fail(request, Unavailable(message, retry_after_s=RETRY_UNAVAILABLE_S))

    def _fail(self, request: Request, error: SafelightError) -> None:
        self._forget(request)
        self._outbox.to_server.append(Failed(request.id, error.info()))

    def _forget(self, request: Request) -> None:
        del self._live[request.id]
        self._deadlines.remove(request)
        if request.replica is None and not self._operations.forget(request):
            self._waiting.remove(request)

    def _resume(self, request: Request) -> None:
        """An operation is done, and what was held behind it waits like any other."""
        self._waiting.add(request)
        if self._operations.asleep:
            self._fail(request, _asleep())

    def _drained(self) -> bool:
        """Whether all that was accepted has ended; of what may not start now, there is nothing to wait for."""
        if self._paused == "in_place":
            return True
        waiting = len(self._waiting) if self._halted() is None else 0
        return waiting == 0 and all(replica.outstanding == 0 for replica in self._replicas)

    def _end_all(self, error: SafelightError) -> None:
        held = set(self._operations.held())
        for request in [request for request in self._live.values() if request not in held]:
            self._stop(request, error)

    def _pause(self, message: Pause) -> None:
        if message.mode == "abort":
            self._end_all(Conflict("The request was ended, as generation is paused."))
        if "in_place" in (message.mode, self._paused):
            self._tell_paused(message.mode == "in_place")
        self._paused = message.mode
        self._pausing.append(message)

    def _continue(self, request_id: str) -> None:
        if self._paused == "in_place":
            self._tell_paused(False)
        self._paused = None
        self._done(request_id)

    def _done(self, request_id: str) -> None:
        """That what needed no replica's report is done."""
        asleep, committed = sorted(self._operations.asleep), self._committed
        self._outbox.to_server.append(Operated(request_id, {}, committed.version, asleep, committed.adapters))

    def _tell_paused(self, paused: bool) -> None:
        for replica in self._replicas:
            if replica.has_loaded:  # also one that is yet to be brought to the committed weights
                self._outbox.to_replicas.append((replica.number, SetPaused(paused)))

    def _answer_pauses(self) -> None:
        """What was to end before the pause has ended, or generation goes on again."""
        idle = all(replica.outstanding == 0 for replica in self._replicas)
        if self._pausing and (idle or self._paused in (None, "in_place")):
            for pause in self._pausing:
                self._done(pause.request_id)
            self._pausing.clear()

    def _abort(self, name: str | None, exact: bool) -> None:
        for request in list(self._live.values()):
            if name in (None, request.id) or (not exact and request.id.rpartition(".")[0] == name):
                self._stop(request, Conflict("The request was ended by an operator."))

    def _halted(self) -> str | None:
        if self._operations.asleep:
            return "asleep"
        return "paused" if self._paused else None

    def _running_on(self, number: int, request_id: str) -> Request | None:
        request = self._live.get(request_id)
        return request if request is not None and request.replica == number else None


def _asleep() -> Conflict:
    return Conflict("The server is asleep; wake it with POST /resume_memory_occupation.")


def _speaks_for(number: int, message: FromWorker) -> bool:
    """Whether a message that names a replica names the one whose socket it came from."""
    match message:
        case ReplicaLoading() | ReplicaReady() | ReplicaFailed() | Heartbeat():
            return message.replica == number
        case _:
            return True
