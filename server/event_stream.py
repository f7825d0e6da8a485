"""A request's events as server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import Response
from starlette.types import Receive, Scope, Send

from ..protocol.errors import ClientGone, SafelightError
from ..protocol.generation import Generate, Preview, Progress, Queued, Result, Started
from .disconnect import while_connected
from .generation_response import base64_of
from .replies import error_object
from .rollout_reply import in_parts
from .scheduler_link import SchedulerLink
from .subscription import Subscription
from .unread import Taker, Unread

KEEP_ALIVE_S = 15.0
"""After so many seconds of silence a comment is sent, so that no proxy takes the connection for dead."""

Event = Queued | Started | Progress | Preview | Result

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(Response):
    """Send ``message`` to the scheduler, and its events to the client as they come.

    An error before the first event is raised and so becomes an ordinary reply with its own status; a later one becomes
    an ``error`` event. ``finish`` makes the ``result`` event's JSON.
    """

    media_type = "text/event-stream"

    def __init__(
        self, link: SchedulerLink, message: Generate, finish: Callable[[Result], Awaitable[bytes]], unread: Unread
    ) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._link = link
        self._message = message
        self._finish = finish
        self._unread = unread

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._stream(send))

    async def _stream(self, send: Send) -> None:
        with self._link.submit(self._message) as events, self._unread.counting(events) as taker:
            event = await events.next()
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            client = _Client(send, taker)
            try:
                last = await self._until_result(event, events, client)
            except ClientGone:
                raise
            except SafelightError as error:
                last = _event("error", orjson.dumps(error_object(error.info())))
        await client.send(last)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _until_result(self, event: Event, events: Subscription, client: _Client) -> bytes:
        """Send the events before the result. Returns the result's."""
        while not isinstance(event, Result):
            await client.send(_intermediate(event))
            event = await _next(events, client)
        return _event("result", await self._finish(event))


@dataclass(frozen=True)
class _Client:
    _send: Send
    _taker: Taker

    async def send(self, body: bytes) -> None:
        """Raises ``ClientGone`` where the client does not take it in time."""
        async with self._taker.sending(len(body)):
            for part in in_parts([body]):
                await self._send({"type": "http.response.body", "body": part, "more_body": True})


async def _next(events: Subscription, client: _Client) -> Event:
    while True:
        try:
            async with asyncio.timeout(KEEP_ALIVE_S):
                return await events.next()
        except TimeoutError:
            await client.send(b": still working\n\n")


def _intermediate(event: Queued | Started | Progress | Preview) -> bytes:
    data: Mapping[str, Any]
    match event:
        case Queued(position=position):
            data = {"position": position}
        case Started():
            return b""
        case Progress(output=output, step=step, steps=steps):
            data = {"output": output, "step": step, "steps": steps}
        case Preview(output=output, step=step, steps=steps, image=image):
            data = {"output": output, "step": step, "steps": steps, "b64": base64_of(image)}
    return _event(type(event).__name__.lower(), orjson.dumps(data))


def _event(name: str, data: bytes) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"
