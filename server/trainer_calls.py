"""Calls of trainers that are no more than another name, or a kept digest."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from ..protocol.adapters import KeepAdapters
from ..protocol.errors import Conflict
from ..protocol.operations import Adapt, CheckTensors, Digests
from ..protocol.reports import Operated
from . import control_bodies as bodies
from .operation_client import OperationClient, first_report, success
from .routes import Route, routes_of
from .service import Service


def routes(service: Service) -> APIRouter:
    return routes_of(_Routes(service).table())


class _Routes:
    def __init__(self, service: Service) -> None:
        self._operations = OperationClient(service)
        self._snapshot: dict[str, dict[str, str]] | None = None  # digests by module and tensor

    def table(self) -> list[Route[Any]]:
        return [
            Route(
                path="/update_weight_version", handler=self.set_version, body=bodies.WeightVersion,
                summary="Call the weights that serve by another version", answer="`weight_version`, `new_version`",
            ),
            Route(
                path="/weights_checker", handler=self.check, body=bodies.WeightsChecker, answer="`weight_version`",
                summary="Keep digests of the weights, and compare with them",
            ),
            Route(
                path="/post_process_weights", handler=self.post_process, body=bodies.PostProcess,
                summary="Accepted: weights serve as they are written",
            ),
        ]  # fmt: skip

    async def set_version(self, request: Request, body: bodies.WeightVersion) -> dict[str, Any]:
        change = Adapt(KeepAdapters(), publishes=True, weight_version=body.new_version)
        operated = await self._operations.operate(request, change, "abort" if body.abort_all_requests else "in_place")
        versions = {"weight_version": operated.weight_version, "new_version": body.new_version}
        return {**success(f"The weights are called {body.new_version}."), **versions}

    async def check(self, request: Request, body: bodies.WeightsChecker) -> dict[str, Any]:
        if body.action == "snapshot":
            return await self._keep(request)
        if body.action == "compare":
            return await self._compare(request)
        return success(
            "No tensor was reset: a server that serves keeps its weights. Each update says in `applied` and `expected` "
            "what it wrote."
        )

    async def _keep(self, request: Request) -> dict[str, Any]:
        operated = await self._operations.operate(request, Digests(None, detail=True))
        report = first_report(operated)
        self._snapshot = {
            module: {name: one.sha256 for name, one in tensors.items()} for module, tensors in report.tensors.items()
        }
        count = sum(map(len, self._snapshot.values()))
        return {**success(f"The digests of {count} tensors are kept."), **self._operations.version(operated)}

    async def _compare(self, request: Request) -> dict[str, Any]:
        """Raises ``OperationFailed`` with the names of tensors that differ on any replica."""
        if self._snapshot is None:
            raise Conflict("There is no snapshot to compare with; send action = snapshot first.", field="action")
        operated: Operated | None = None
        for module, expected in self._snapshot.items():
            operated = await self._operations.operate(request, CheckTensors(module, expected))
        assert operated is not None, "a model has modules"
        return {**success("All tensors are as they were."), **self._operations.version(operated)}

    async def post_process(self, request: Request, body: bodies.PostProcess) -> dict[str, Any]:
        return success("Nothing is to be done; weights serve as they are written.")
