"""The accepted requests, until each has its answer: where they wait, and when they expire."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ..protocol.config import Config
from ..protocol.generation import Generate
from .barrier_queue import BarrierQueue
from .queue import Queue, by_deadline, by_turn
from .request import Request


class Requests:
    """A request waits in ``queue`` or, behind an operation, in the barrier queue; else a replica has it."""

    def __init__(self, config: Config, barrier_queue: BarrierQueue) -> None:
        self.queue = Queue(by_turn)
        self._timeout_s = config.request_timeout_s
        self._barrier_queue = barrier_queue
        self._deadlines = Queue(by_deadline)
        self._live: dict[str, list[Request]] = {}
        """The copies of each request by its id; most requests have one."""
        self._waiting: Counter[str] = Counter()
        """The number of copies that wait, by the request's id."""
        self._arrivals = 0
        self._checked: frozenset[int] | None = None
        """The replicas that were ready when every waiting request had one; ``None`` after a pinned one has come."""

    def __iter__(self) -> Iterator[Request]:
        return iter([request for copies in self._live.values() for request in copies])

    def __len__(self) -> int:
        """The number of requests; the copies of one count once."""
        return len(self._live)

    def get(self, request_id: str) -> list[Request]:
        """The request, or all its copies that have no answer yet."""
        return list(self._live.get(request_id, ()))

    def running_on(self, number: int, request_id: str) -> Request | None:
        return next((request for request in self._live.get(request_id, ()) if request.replica == number), None)

    def accept(self, generate: Generate, nbytes: int, now: float, *, pinned_to: int | None, behind: bool) -> int:
        """Put a request into its queue, ``behind`` an operation if there is one. Returns the number of those ahead."""
        timeout_s = self._timeout_s if generate.timeout_s is None else generate.timeout_s
        request = Request(generate, self._arrivals, now, now + timeout_s, nbytes, pinned_to=pinned_to)
        self._arrivals += 1
        self._live.setdefault(request.id, []).append(request)
        self._deadlines.add(request)
        self._waiting[request.id] += 1
        if pinned_to is not None:
            self._checked = None
        if behind:
            return len(self.queue) + self._barrier_queue.enqueue_behind(request)
        return self.queue.add(request)

    def start(self, request: Request, number: int, now: float) -> None:
        """Replica ``number`` gets a request of the queue."""
        self.queue.remove(request)
        self._waits_no_longer(request)
        request.start(number, now)

    def _waits_no_longer(self, request: Request) -> None:
        self._waiting[request.id] -= 1
        if not self._waiting[request.id]:
            del self._waiting[request.id]

    def remove(self, request: Request) -> None:
        """It is answered."""
        copies = self._live[request.id]
        copies.remove(request)
        if not copies:
            del self._live[request.id]
        self._deadlines.remove(request)
        if request.replica is None:
            self._waits_no_longer(request)
            if not self._barrier_queue.remove(request):
                self.queue.remove(request)

    def without_replica(self, ready: frozenset[int]) -> list[Request]:
        """The waiting requests that none of the ``ready`` replicas may run.

        A request is admitted only while a replica is ready. So there are none unless a replica was lost or a pinned
        request has come since the last call, and only then the queues are searched.
        """
        checked, self._checked = self._checked, ready
        if checked is not None and checked <= ready:
            return []
        waiting = [*self.queue, *self._barrier_queue.requests()]
        return [request for request in waiting if not request.may_run_on(ready)]

    @property
    def waiting_count(self) -> int:
        """The number of requests that wait; the copies of one count once, as the outputs of one do."""
        return len(self._waiting)

    def waiting_bytes(self) -> int:
        return self.queue.nbytes + sum(request.nbytes for request in self._barrier_queue.requests())

    def not_queued_behind(self) -> list[Request]:
        """The requests that no operation holds back."""
        behind = set(self._barrier_queue.requests())
        return [request for request in self if request not in behind]

    @property
    def next_to_expire(self) -> Request | None:
        return self._deadlines.first
