"""What a request has to pass before any endpoint sees it: the API key, and the limit on its body."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..protocol.errors import BodyTooLarge, Forbidden, Unauthorized

OPEN_ROUTES = frozenset({"/liveness", "/health", "/health_generate"})
"""Routes that need no key, because whoever restarts a server has none."""


class ApiKeyMiddleware:
    """Asks for ``Authorization: Bearer KEY`` when the server has a key."""

    def __init__(self, app: ASGIApp, *, api_key: str | None) -> None:
        self._app = app
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._api_key is not None and scope["path"] not in OPEN_ROUTES:
            _check_key(Headers(scope=scope).get("authorization"), self._api_key)
        await self._app(scope, receive, send)


def _check_key(header: str | None, api_key: str) -> None:
    scheme, _, token = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthorized("This server asks for an API key; send it as `Authorization: Bearer KEY`.")
    if not hmac.compare_digest(token.strip().encode("latin-1"), api_key.encode()):
        raise Forbidden("The API key is not the one that this server was started with.")


class BodyLimitMiddleware:
    """Refuses a body over ``limit`` bytes: by its announced length at once, otherwise as soon as that much has come.

    ``larger`` are limits of some paths for bodies of some media type.
    """

    def __init__(self, app: ASGIApp, *, limit: int, larger: Mapping[tuple[str, str], int]) -> None:
        self._app = app
        self._limit = limit
        self._larger = larger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit = self._larger.get((scope["path"], media_type(headers)), self._limit)
        announced = headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > limit:
            raise _too_large(limit)
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise _too_large(limit)
            return message

        await self._app(scope, limited_receive, send)


def media_type(headers: Headers) -> str:
    """What the body is, without parameters."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body has more than the {limit / 1e6:g} MB that this server takes.")
