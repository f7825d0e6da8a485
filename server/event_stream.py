"""A request's events as server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
from fastapi import Response
from starlette.types import Receive, Scope, Send

from ..protocol.errors import SafelightError
from ..protocol.messages import Generate, Preview, Progress, Queued, Result, Started
from .disconnect import while_connected
from .replies import error_object
from .representation import base64_of
from .scheduler_link import SchedulerLink, Subscription

KEEP_ALIVE_S = 15.0
"""After so many seconds of silence a comment is sent, so that no proxy takes the connection for dead."""

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(Response):
    """Sends ``message`` to the scheduler and its events to the client, each as soon as it comes.

    An error before the first event is raised and so becomes an ordinary reply with its own status; a later one becomes
    an ``error`` event. ``finish`` makes the ``result`` event's JSON.
    """

    media_type = "text/event-stream"

    def __init__(self, link: SchedulerLink, message: Generate, finish: Callable[[Result], Awaitable[bytes]]) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._link = link
        self._message = message
        self._finish = finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._stream(send))

    async def _stream(self, send: Send) -> None:
        with self._link.submit(self._message) as events:
            event = await events.next()
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                while not isinstance(event, Result):
                    await _send(send, _intermediate(event))
                    event = await self._next(events, send)
                await _send(send, _event("result", await self._finish(event)))
            except SafelightError as error:
                await _send(send, _event("error", orjson.dumps(error_object(error.info()))))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self, events: Subscription, send: Send) -> Queued | Started | Progress | Preview | Result:
        while True:
            try:
                async with asyncio.timeout(KEEP_ALIVE_S):
                    return await events.next()
            except TimeoutError:
                await _send(send, b": still working\n\n")


async def _send(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


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
