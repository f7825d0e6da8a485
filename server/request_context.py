"""The outermost middleware: each request's id, log line and metrics, and the reply to an uncaught exception."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..process.logs import request_id_var
from ..protocol.errors import ClientGone, Internal, SafelightError, Unavailable
from .metrics import Metrics
from .replies import error_reply, refusal_of

own_id_var: contextvars.ContextVar[str] = contextvars.ContextVar("own_id")
"""The current request's id within the server: unguessable, whatever ``X-Request-Id`` the client sent."""

_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")

_POLLED = frozenset({"/liveness", "/health", "/health_generate", "/metrics"})  # monitoring polls them often

_LONGEST = 500
"""The limit of characters from a client in a log line."""

_LONGEST_METHOD = 20  # the longest registered method is UPDATEREDIRECTREF

log = logging.getLogger(__name__)


class RequestContextMiddleware:
    """Wraps each HTTP request in an :class:`RequestContext`."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await RequestContext(self._metrics, scope, receive, send).run(self._app)
        else:
            await self._app(scope, receive, send)


class RequestContext:
    """One request and its reply."""

    def __init__(self, metrics: Metrics, scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics = metrics
        self._scope = scope
        self._receive = receive
        self._send = send
        self._started_at = time.perf_counter()
        self._status: int | None = None
        self._complete = False
        self._client_gone = False
        self._own_id = self._id = uuid.uuid4().hex
        if _SANE_ID.fullmatch(name := Headers(scope=scope).get("x-request-id", "")):
            self._id, self._own_id = name, f"{name}.{self._own_id}"

    async def run(self, app: ASGIApp) -> None:
        own_id_var.set(self._own_id)
        request_id_var.set(self._id)  # each request is a task of its own, so other requests do not see it
        try:
            await self._answer(app)
        finally:
            self._account()

    async def _answer(self, app: ASGIApp) -> None:
        error: SafelightError
        try:
            await app(self._scope, self._watched_receive, self._stamped_send)
            return
        except SafelightError as raised:
            error = raised
        except ClientDisconnect:
            error = ClientGone("The client disconnected while it sent its request.")
        except asyncio.CancelledError:  # uvicorn stops without waiting; nothing outside needs the cancellation
            error = Unavailable("The server was stopped.")
        except Exception:  # the outermost handler of a request
            log.exception("the request failed by a fault of the server")
            error = Internal("The server made a mistake; its log has the details under this request id.")
        if self._status is None:
            await error_reply(error.info())(self._scope, self._watched_receive, self._stamped_send)
        elif not self._client_gone:
            log.error("the answer was cut off: %s", error.message)

    async def _watched_receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._complete:
            self._client_gone = True
        return message

    async def _stamped_send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"], headers["X-Safelight-Id"] = self._id, self._own_id
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._complete = True

    def _account(self) -> None:
        status = 499 if self._client_gone or self._status is None else self._status
        seconds = time.perf_counter() - self._started_at
        route = _route_of(self._scope)
        self._metrics.count_request(route, status, seconds)
        level = logging.DEBUG if route in _POLLED else logging.INFO
        method, path = self._scope["method"][:_LONGEST_METHOD], _path_of(self._scope)
        fields: dict[str, str | int | float | None] = {
            "method": method, "path": path, "status": status, "duration_ms": round(1000 * seconds, 1)
        }  # fmt: skip
        reason = ""
        if (refusal := refusal_of(self._scope)) is not None:
            fields |= {"code": refusal.code, "field": refusal.field, "error": refusal.message[:_LONGEST]}
            reason = f" {refusal.code}{f' {refusal.field}' if refusal.field else ''}: {refusal.message[:_LONGEST]}"
        log.log(level, "%s %s %d %.1f ms%s", method, path, status, 1000 * seconds, reason, extra={"fields": fields})


def _route_of(scope: Scope) -> str:
    """The route's path, or "unmatched": a label of metrics, without text from clients."""
    route = scope.get("route")
    return "unmatched" if route is None else str(route.path)


def _path_of(scope: Scope) -> str:
    """The route's path; for an unknown route, the requested path, still percent-encoded and so without spaces."""
    route = scope.get("route")
    return scope["raw_path"].decode("latin-1")[:_LONGEST] if route is None else str(route.path)
