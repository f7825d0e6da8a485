"""Send operations to the scheduler, and describe their outcome."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import Request

from ..process.logs import request_id_var
from ..protocol.adapters import AdapterState
from ..protocol.operations import AbortRequests, Barrier, Continue, ListAdapters, Operate, Operation, Pause
from ..protocol.reports import Operated, Report
from .disconnect import while_connected
from .service import Service


def success(message: str) -> dict[str, Any]:
    return {"success": True, "message": message}


def first_report(operated: Operated) -> Report:
    """The first replica's report; it is the primary for work that is done once."""
    return next(iter(operated.reports.values()), Report())


def active_adapters(state: AdapterState) -> dict[str, Any]:
    """The adapters that are active for all requests, by component."""
    return {
        component: [msgspec.to_builtins(one) | {"path": state.loaded[one.nickname].source.path} for one in ones]
        for component, ones in state.active.items()
    }


class OperationClient:
    """Sends operations to the scheduler, each with its own id."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def operate(self, request: Request, operation: Operation, mode: Barrier = "in_place") -> Operated:
        return await self.send(request, lambda request_id: Operate(request_id, operation, mode))

    async def send(
        self, request: Request, message: Callable[[str], Operate | Pause | Continue | AbortRequests | ListAdapters]
    ) -> Operated:
        """Raises ``ClientGone`` if the client disconnects; an operation that has not begun then is dropped."""
        with self._service.link.submit(message(self.new_id())) as events:
            return await while_connected(request.receive, events.operated())

    def without_reply(self, operation: Operation) -> None:
        self._service.link.send(Operate(self.new_id(), operation))

    def version(self, operated: Operated) -> dict[str, Any]:
        model = self._service.link.model()
        return {"weight_version": operated.weight_version or (model.weight_version if model is not None else None)}

    def new_id(self) -> str:
        return f"{request_id_var.get()}.operation-{secrets.token_hex(8)}"
