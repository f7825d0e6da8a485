"""Routes of trainers and operators: bodies, handlers, and descriptions for the API reference."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
from fastapi import APIRouter, Request, Response

from ..protocol.errors import ErrorInfo, SafelightError
from ..protocol.reports import Report
from .answers import OPERATING, Done, TrainingRefusal, answers, query, request_body
from .body_limit import media_type
from .body_validation import Body, decode, refuse_query
from .bounded import MAX_VALUES, read_body
from .replies import error_reply, json_reply
from .subscription import OperationFailed

B = TypeVar("B", bound=Body)

_ALL_THE_SAME = {403: 400, 404: 400}
"""The contract has one status for what a client asks wrongly here; the error's code says which it was."""


@dataclass(frozen=True)
class Streamed:
    """The other type that a route's body may have, whose fields are in the query, and who answers it then."""

    media_type: str
    query: type[Body]
    handler: Callable[[Request], Awaitable[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Route(Generic[B]):
    """``refused`` hears of a body that cannot be read, with as much of it as has come."""

    path: str
    summary: str
    handler: Callable[[Request, B], Awaitable[dict[str, Any]]]
    body: type[B]
    answer: str = "`success` and `message`"
    query: type[Body] | None = None
    max_values: int = MAX_VALUES
    streamed: Streamed | None = None
    refused: Callable[[bytearray], None] | None = None

    async def __call__(self, request: Request) -> dict[str, Any]:
        if self.streamed is not None and media_type(request.headers) == self.streamed.media_type:
            return await self.streamed.handler(request)
        if self.query is None:
            refuse_query(request)
        return await self.handler(request, await self._read(request))

    async def _read(self, request: Request) -> B:
        raw = bytearray()
        try:
            raw = await read_body(request)
            return await decode(raw, self.body, self.max_values)
        except SafelightError:
            if self.refused is not None:
                self.refused(raw)
            raise

    def described(self, method: str) -> dict[str, Any]:
        """Its request, for OpenAPI."""
        found = request_body(self.body) if method == "POST" else {}
        if self.streamed is not None:
            binary = {"schema": {"type": "string", "format": "binary"}}
            found["requestBody"]["content"][self.streamed.media_type] = binary
            found["parameters"] = query(self.streamed.query)
        if self.query is not None:
            found["parameters"] = query(self.query)
        return found


def routes_of(table: Iterable[Route[Any]], method: str = "POST") -> APIRouter:
    """Routes whose every reply says ``success`` and ``message``."""
    router = APIRouter(tags=["post-training"])
    for route in table:
        router.add_api_route(
            route.path,
            _replying(route),
            name=route.path.strip("/"),
            methods=[method],
            summary=route.summary,
            openapi_extra=route.described(method),
            responses=answers(route.answer, OPERATING, reply=Done, refusal=TrainingRefusal),
        )
    return router


def _replying(route: Route[Any]) -> Callable[..., Awaitable[Response]]:
    async def reply(request: Request) -> Response:
        try:
            return json_reply(await route(request))
        except OperationFailed as failed:
            return _failed(failed.error.info(), **_details(failed.report))
        except SafelightError as error:
            return _failed(error.info())

    return reply


def _failed(info: ErrorInfo, **details: Any) -> Response:
    """The reply to a failure: ``success`` and ``message`` beside the contract's error object."""
    status = _ALL_THE_SAME.get(info.status, info.status)
    info = msgspec.structs.replace(info, status=status)
    return error_reply(info, success=False, message=info.message, **details)


def _details(report: Report | None) -> dict[str, Any]:
    if report is None:
        return {}
    if report.mismatched:
        return {"missing": report.missing, "mismatched": report.mismatched}
    return {
        **({"missing": report.missing, "mismatched": []} if report.missing else {}),
        "applied": 0,
        "expected": sum(report.expected.values()),
        "unknown": report.unknown,
        "invalid": msgspec.to_builtins(report.invalid),
    }
