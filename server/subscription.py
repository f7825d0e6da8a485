"""The events of a request or an operation, from its sending to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..protocol.errors import DeadlinePassed, SafelightError, from_info
from ..protocol.generation import Failed, Preview, Progress, Queued, Result, Started
from ..protocol.reports import Operated, Report

Event = Queued | Started | Progress | Preview | Result | Failed | Operated

EVENTS_KEPT = 32
"""Events that a request may have unread; beyond it progress and previews are dropped, so a slow reader costs little."""

PREVIEWS_KEPT = 2
"""Unread previews among them; each is a whole picture."""

LATE_S = 2.0
"""Seconds after its deadline at which a request ends here, though the scheduler, which keeps it too, says nothing."""


class OperationFailed(Exception):
    """An operation was not done; ``report`` has the details, if there are any."""

    def __init__(self, error: SafelightError, report: Report | None) -> None:
        super().__init__(error.message)
        self.error = error
        self.report = report


class Subscription:
    """The events of one request, in order; ``timeout_s`` is its own, ``None`` that of an operation, which has none.

    ``answers`` is the number of results that are expected: a request with copies has one from each.
    ``unread_bytes`` counts the pictures in events that nobody has read yet; ``admit`` may replace a result that comes.
    """

    def __init__(self, request_id: str, timeout_s: float | None = None, *, answers: int = 1) -> None:
        self.request_id = request_id
        self.is_operation = timeout_s is None
        self.unread_bytes = 0
        self.admit: Callable[[Result], Result | Failed] = lambda result: result
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s + LATE_S
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._previews = 0  # among them
        self._answers_due = answers

    @property
    def ended(self) -> bool:
        """True if nothing is left to cancel."""
        return self._answers_due <= 0

    def deliver(self, event: Event) -> None:
        if isinstance(event, Progress | Preview) and self._events.qsize() >= EVENTS_KEPT:
            return
        if isinstance(event, Preview):
            if self._previews >= PREVIEWS_KEPT:
                return
            self._previews += 1
        if isinstance(event, Result):
            event = self.admit(event)
        self.unread_bytes += _bytes_of(event)
        self._answers_due -= isinstance(event, Result | Failed | Operated)
        self._events.put_nowait(event)

    async def next(self) -> Queued | Started | Progress | Preview | Result:
        """The next event. Raises the request's own error when it failed, and ``DeadlinePassed``."""
        try:
            async with asyncio.timeout_at(self._deadline):
                event = await self._events.get()
        except TimeoutError:
            raise DeadlinePassed(
                f"The request's {self._timeout_s:g} s ran out, and the scheduler has said nothing of it."
            ) from None
        self.unread_bytes -= _bytes_of(event)
        if isinstance(event, Failed):
            raise from_info(event.error)
        assert not isinstance(event, Operated), "this is a request's"
        self._previews -= isinstance(event, Preview)
        return event

    async def operated(self) -> Operated:
        """An operation's end. Raises ``OperationFailed``."""
        event = await self._events.get()
        if isinstance(event, Failed):
            raise OperationFailed(from_info(event.error), event.report)
        assert isinstance(event, Operated), "this is an operation's"
        return event

    async def result(self) -> Result:
        while not isinstance(event := await self.next(), Result):
            pass
        return event


def _bytes_of(event: Event) -> int:
    """The bytes of the pictures in ``event``."""
    match event:
        case Preview(image=image):
            return len(image)
        case Result(outputs=outputs):
            return sum(len(output.data) for output in outputs)
    return 0
