"""Limits on the bodies of requests: bytes of each, bytes of all together, and the time in which a body arrives."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..protocol.errors import BodyTooLarge, DeadlinePassed, Malformed, QueueFull

_FREE = 64 * 1024
"""The first bytes of each body, which do not count, so that large bodies do not keep small ones out."""
_SLOWEST = 1_000_000
"""Bytes per second: a body's time limit grows with its announced length at this rate."""

_RETRY_AFTER_S = 5.0


@dataclass(frozen=True)
class BodyLimits:
    """The limit of a body in bytes: by path and media type, else by path, else ``others``."""

    others: int
    by_path: Mapping[str, int]
    streamed: Mapping[tuple[str, str], int]
    """Limits of bodies that :mod:`.uploads` writes to shared memory while they arrive; it limits their time too."""


class BodyMemory:
    """Counts the bytes of all bodies that the server holds."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0

    def take(self, size: int) -> None:
        """Raises ``QueueFull``."""
        if self.held + size > self._limit:
            raise QueueFull(
                f"The bodies of other requests fill the {self._limit / 1e6:g} MB for bodies (--max-bodies-mb).",
                retry_after_s=_RETRY_AFTER_S,
            )
        self.held += size

    def give_back(self, size: int) -> None:
        self.held -= size


class BodyLimitMiddleware:
    """Bounds the bytes of each body and of all bodies, and the time in which a body arrives.

    A body over its limit is refused by its announced length before it is read, or once more bytes than the limit have
    arrived. The error is raised in the endpoint that reads the body, so that the endpoint can do its own cleanup.
    """

    def __init__(self, app: ASGIApp, *, limits: BodyLimits, memory: BodyMemory, timeout_s: float) -> None:
        self._app = app
        self._limits = limits
        self._memory = memory
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        _check_encoding(headers)
        route = (scope["path"], media_type(headers))
        streamed = self._limits.streamed.get(route)
        limit = streamed or self._limits.by_path.get(scope["path"], self._limits.others)
        announced = _announced(headers, limit)
        if streamed is not None:
            if announced > limit:
                raise _too_large(limit)
            await self._app(scope, receive, send)
            return
        body = _Body(receive, limit, announced, self._memory, self._timeout_s + announced / _SLOWEST)
        try:
            await self._app(scope, body.receive, send)
        finally:
            body.release()


class _Body:
    """A body that is arriving."""

    def __init__(self, receive: Receive, limit: int, announced: int, memory: BodyMemory, timeout_s: float) -> None:
        self._receive = receive
        self._limit = limit
        self._announced = announced
        self._memory = memory
        self._timeout_s = timeout_s
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._received = 0
        self._taken = 0
        self._ended = False

    async def receive(self) -> Message:
        if self._ended:  # the endpoint has consumed the body and now waits for a disconnect
            self.release()
            return await self._receive()
        if self._announced > self._limit:
            raise _too_large(self._limit)
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise DeadlinePassed(f"The body did not arrive within {self._timeout_s:.0f} s.") from None
        self._count(len(message.get("body", b"")))
        self._ended = not message.get("more_body", False)
        return message

    def _count(self, size: int) -> None:
        self._received += size
        if self._received > self._limit:
            raise _too_large(self._limit)
        if (more := self._received - _FREE - self._taken) > 0:
            self._memory.take(more)
            self._taken += more

    def release(self) -> None:
        self._memory.give_back(self._taken)
        self._taken = 0


def _check_encoding(headers: Headers) -> None:
    """Raises ``Malformed`` for a compressed body: a small one may become any size."""
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise Malformed(f"Bodies are read uncompressed; leave out Content-Encoding: {encoding[:100]!r}.")


def _announced(headers: Headers, limit: int) -> int:
    """The announced length; 0 without one, and ``limit + 1`` for one that is not a valid number."""
    text = headers.get("content-length", "0")
    return int(text) if text.isdigit() and len(text) <= 18 else limit + 1


def media_type(headers: Headers) -> str:
    """The media type of the body, in lower case and without parameters."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body has more than the {limit / 1e6:g} MB that this route takes.")
