"""How the post-training routes reach the scheduler, and the form of their replies."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from ..process.logs import request_id_var
from ..protocol.adapters import AdapterState
from ..protocol.errors import ErrorInfo, SafelightError
from ..protocol.operations import AbortRequests, Barrier, Continue, ListAdapters, Operate, Operation, Pause
from ..protocol.reports import Operated, Report
from .disconnect import while_connected
from .replies import error_reply, json_reply
from .scheduler_link import OperationFailed
from .service import Service

Handler = Callable[[Request], Awaitable[dict[str, Any]]]

_ALL_THE_SAME = {403: 400, 404: 400}
"""The contract has one status for what a client asks wrongly here; the error's code says which it was."""


def routes_of(table: list[tuple[str, Handler, str]], method: str = "POST") -> APIRouter:
    """``table`` has paths, what answers them, and a line for the reference."""
    router = APIRouter(tags=["post-training"])
    for path, handler, summary in table:
        router.add_api_route(path, _replying(handler), methods=[method], summary=summary)
    return router


def _replying(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """Every reply says ``success`` and ``message``; of a failure, beside the contract's error object."""

    @functools.wraps(handler)
    async def reply(request: Request) -> Response:
        try:
            told = await handler(request)
        except OperationFailed as failed:
            return _failed(failed.error.info(), **_details(failed.report))
        except SafelightError as error:
            return _failed(error.info())
        return json_reply(told)

    reply.__annotations__ = {"request": Request, "return": Response}
    return reply


def _failed(info: ErrorInfo, **details: Any) -> Response:
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


def success(message: str) -> dict[str, Any]:
    return {"success": True, "message": message}


def first_report(operated: Operated) -> Report:
    """What the first of the replicas says, which leads in what is done once."""
    return next(iter(operated.reports.values()), Report())


def active_adapters(state: AdapterState) -> dict[str, Any]:
    """By component, those that are in every request's weights or beside them."""
    return {
        component: [
            {
                "nickname": one.nickname,
                "path": state.loaded[one.nickname].source.path,
                "merged": one.merged,
                "mode": one.mode,
                "strength": one.strength,
            }
            for one in ones
        ]
        for component, ones in state.active.items()
    }


class Operating:
    """Has the scheduler do operations, each with an id of its own."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def operate(self, request: Request, operation: Operation, mode: Barrier = "in_place") -> Operated:
        return await self.send(request, lambda request_id: Operate(request_id, operation, mode))

    async def send(
        self, request: Request, message: Callable[[str], Operate | Pause | Continue | AbortRequests | ListAdapters]
    ) -> Operated:
        """Raises ``ClientGone`` when nobody waits any more: what has not begun then is not done."""
        with self._service.link.submit(message(self.new_id())) as events:
            return await while_connected(request.receive, events.operated())

    def without_reply(self, operation: Operation) -> None:
        self._service.link.send(Operate(self.new_id(), operation))

    def version(self, operated: Operated) -> dict[str, Any]:
        model = self._service.link.model()
        return {"weight_version": operated.weight_version or (model.weight_version if model is not None else None)}

    def new_id(self) -> str:
        return f"{request_id_var.get()}.operation-{secrets.token_hex(8)}"
