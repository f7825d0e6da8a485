"""Authentication of requests by API key."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ..protocol.errors import Forbidden, Unauthorized

OPEN_ROUTES = frozenset({"/liveness", "/health", "/health_generate", "/docs", "/openapi.json"})
"""Routes without a key: supervisors poll health without one, and a browser opens the API reference without one."""


class ApiKeyMiddleware:
    """Requires ``Authorization: Bearer KEY`` if the server has a key."""

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
        raise Unauthorized("This server requires an API key: send it as `Authorization: Bearer KEY`.")
    if not hmac.compare_digest(token.strip().encode("latin-1"), api_key.encode()):
        raise Forbidden("The API key is not the server's.")
