"""Replies as JSON: every one is written by orjson, and every error has the one shape of the wire contract."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import Response
from starlette.types import Receive, Scope, Send

from ..process.logs import request_id_var
from ..protocol.errors import ErrorInfo

_REFUSAL = "safelight.refusal"
_RETRY_AFTER_S = {429: 1.0, 503: 5.0}  # when the error itself does not know


def json_reply(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


def error_reply(info: ErrorInfo, headers: Mapping[str, str] | None = None, **beside: Any) -> Response:
    """``info`` as the contract's error object, with ``beside`` next to it in the body."""
    headers = {**(headers or {}), **_headers_of(info)}
    return _ErrorReply(info, orjson.dumps({**error_object(info), **beside}), headers)


def refusal_of(scope: Scope) -> ErrorInfo | None:
    """The error that a request was answered with, for its log line."""
    refusal: ErrorInfo | None = scope.get(_REFUSAL)
    return refusal


class _ErrorReply(Response):
    def __init__(self, info: ErrorInfo, content: bytes, headers: Mapping[str, str]) -> None:
        super().__init__(content, info.status, headers, media_type="application/json")
        self._info = info

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[_REFUSAL] = self._info
        await super().__call__(scope, receive, send)


def error_object(info: ErrorInfo) -> dict[str, Any]:
    error = {"code": info.code, "message": info.message, "field": info.field, "request_id": request_id_var.get()}
    return {"error": error}


def _headers_of(info: ErrorInfo) -> dict[str, str]:
    if info.status in _RETRY_AFTER_S:
        seconds = info.retry_after_s if info.retry_after_s is not None else _RETRY_AFTER_S[info.status]
        return {"Retry-After": str(max(1, math.ceil(seconds)))}
    if info.status == 401:
        return {"WWW-Authenticate": "Bearer"}
    return {}
