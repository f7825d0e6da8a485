"""The server's end of the socket to the scheduler: sends requests, hands each one its events, keeps the last status."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Self, TypeVar

import msgspec
import zmq
import zmq.asyncio

from ..protocol import messages
from ..protocol.adapters import AdapterState
from ..protocol.errors import ErrorInfo, SafelightError, Unavailable, from_info
from ..protocol.generation import Cancel, Failed, Generate, GenerateCopies, Result
from ..protocol.messages import FROM_SCHEDULER, TO_SCHEDULER
from ..protocol.operations import AbortRequests, Continue, ListAdapters, Operate, Pause
from ..protocol.replicas import ModelInfo, Status
from ..protocol.reports import Operated
from .on_the_way import OnTheWay
from .subscription import Subscription

T = TypeVar("T")
STATUS_FRESH_S = 10.0
"""A scheduler that has said nothing for longer than this does not count as answering."""

SILENT_S = 60.0
"""Seconds of the scheduler's silence after which operations, which have no deadline, end here."""

_RETRY_AFTER_S = 5.0

_TICK_S = 1.0

log = logging.getLogger(__name__)


class SchedulerLink:
    """An asynchronous context: the connection to the scheduler at ``address``."""

    def __init__(self, address: str, *, request_timeout_s: float = 600.0, most_unheard: int = 1 << 30) -> None:
        """``request_timeout_s`` is for requests without a ``timeout_s``.

        ``most_unheard`` are the bytes of all that may be on its way to a scheduler that is stopped, or slow.
        """
        self._address = address
        self._request_timeout_s = request_timeout_s
        self._heard = 0
        self._on_the_way = OnTheWay(most_unheard)
        self._subscriptions: dict[str, Subscription] = {}
        self._status = Status(0, 0, [])
        self._status_at = float("-inf")
        self._news = asyncio.Event()
        self._refusal: ErrorInfo | None = None
        self.adapters = AdapterState()
        """The scheduler's last adapter list."""

    async def __aenter__(self) -> Self:
        # not before: a context that is collected with its socket still open blocks its thread for ever
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        # Without marks neither side drops or waits. What can pile up is bounded here, and by the scheduler's own queue.
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self._socket.connect(self._address)
        self.send(Cancel(""))  # a hello: the scheduler now knows where to send its status
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._keep_in_touch())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    @property
    def status(self) -> Status:
        """The scheduler's last state."""
        return self._status

    @property
    def answers(self) -> bool:
        return time.monotonic() - self._status_at < STATUS_FRESH_S

    async def silence(self, longest_s: float) -> float:
        """Wait until the scheduler, whose status comes every second, has said nothing for ``longest_s`` seconds.

        Returns these seconds. They count from the call on, and only while this process's own loop turns: what came
        during a pause of it is heard first.
        """
        heard, silent_s = self._heard, 0.0
        while silent_s < longest_s:
            step_s = min(_TICK_S, longest_s)
            await asyncio.sleep(step_s)
            silent_s = silent_s + step_s if self._heard == heard else 0.0
            heard = self._heard
        return silent_s

    async def _keep_in_touch(self) -> None:
        """Greet a scheduler that says nothing: it may be a new one, which does not know whom to tell its status.

        Operations end when it has been silent for too long.
        """
        silent_s = 0.0
        while True:
            heard = self._heard
            await asyncio.sleep(_TICK_S)
            silent_s = 0.0 if self._heard != heard else silent_s + _TICK_S
            if silent_s:
                self.send(Cancel(""))
            if silent_s >= SILENT_S:
                message = f"The scheduler has said nothing for {silent_s:.0f} s; what became of this is not known."
                self._fail(Unavailable(message, retry_after_s=_RETRY_AFTER_S), lambda one: one.is_operation)

    def fail_all(self, error: SafelightError) -> None:
        """End every request and operation of now: the scheduler that knew of them is gone. Later ones are sent."""
        self._fail(error, lambda one: True)

    def _fail(self, error: SafelightError, which: Callable[[Subscription], bool]) -> None:
        for subscription in self._subscriptions.values():
            if which(subscription) and not subscription.ended:
                self.send(Cancel(subscription.request_id))
                subscription.deliver(Failed(subscription.request_id, error.info()))

    async def status_where(self, find: Callable[[Status], T | None]) -> T:
        """Wait for a status in which ``find`` finds something, and return that."""
        while (found := find(self._status)) is None:
            await self._news.wait()
        return found

    def model(self) -> ModelInfo | None:
        """The model of a ready replica or, if none is ready, the last known model."""
        models = [(replica.state == "ready", replica.model) for replica in self._status.replicas]
        known = [(ready, model) for ready, model in models if model is not None]
        return max(known, key=lambda entry: entry[0])[1] if known else None

    def ready_model(self) -> ModelInfo:
        """The model of the ready replicas. Raises ``Unavailable`` with every replica's reason when none is ready."""
        for replica in self._status.replicas:
            if replica.state == "ready" and replica.model is not None:
                return replica.model
        raise self.unavailable()

    def unavailable(self) -> Unavailable:
        """The error for no ready replica, with every replica's reason."""
        reasons = "; ".join(
            f"replica {replica.replica} is {replica.state} ({replica.message})" for replica in self._status.replicas
        )
        return Unavailable(f"No replica is ready: {reasons or 'they are starting'}.", retry_after_s=_RETRY_AFTER_S)

    def send(self, message: messages.ToScheduler) -> None:
        self._send(TO_SCHEDULER.encode(message))

    def _send(self, frames: list[bytes | memoryview]) -> None:
        if not self._socket.closed:
            self._on_the_way.sent(frames)
            self._socket.send_multipart(frames)  # never waits: the socket has no mark

    @contextlib.contextmanager
    def submit(
        self, message: Generate | Operate | Pause | Continue | AbortRequests | ListAdapters
    ) -> Iterator[Subscription]:
        """Send ``message`` and receive its events. Leaving before the end cancels the request.

        Raises ``Unavailable`` where too many bytes sent before still wait for the scheduler.
        """
        timeout_s = self._timeout_s(message) if isinstance(message, Generate) else None
        with self._subscribed(message, Subscription(message.request_id, timeout_s)) as subscription:
            yield subscription

    def _timeout_s(self, message: Generate) -> float:
        return self._request_timeout_s if message.timeout_s is None else message.timeout_s

    @contextlib.contextmanager
    def _subscribed(self, message: messages.ToScheduler, subscription: Subscription) -> Iterator[Subscription]:
        """Send ``message``, which brings about the events of ``subscription``."""
        if self._refusal is not None:
            raise from_info(self._refusal)
        frames = TO_SCHEDULER.encode(message)
        self._on_the_way.check(frames)
        request_id = subscription.request_id
        assert request_id not in self._subscriptions, "request ids are unique"
        self._subscriptions[request_id] = subscription
        self._send(frames)
        try:
            yield subscription
        finally:
            del self._subscriptions[request_id]
            if not subscription.ended:
                self.send(Cancel(request_id))

    async def result(self, message: Generate) -> Result:
        """Send ``message``, and wait for its result. Raises the request's own error."""
        with self.submit(message) as events:
            return await events.result()

    async def results(self, message: Generate, replicas: list[int]) -> list[Result]:
        """Each replica's result, in the order of their ends. Raises the first error, and cancels the others then."""
        subscription = Subscription(message.request_id, self._timeout_s(message), answers=len(replicas))
        with self._subscribed(GenerateCopies(message, replicas), subscription):
            return [await subscription.result() for _ in replicas]

    def abandon_all(self, error: SafelightError) -> None:
        """End every request, and each later one, with ``error``."""
        self._refusal = error.info()
        self.fail_all(error)

    async def _receive(self) -> None:
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            self._heard += 1
            try:
                event = FROM_SCHEDULER.decode([frame.buffer for frame in frames])
            except msgspec.MsgspecError:
                log.exception("a message from the scheduler cannot be read")
                continue
            if isinstance(event, Status):
                self._status, self._status_at = event, time.monotonic()
                self._on_the_way.heard(event.heard)
                self._news.set()
                self._news = asyncio.Event()
                continue
            if isinstance(event, Operated):
                self.adapters = event.adapters
            if subscription := self._subscriptions.get(event.request_id):
                subscription.deliver(event)
