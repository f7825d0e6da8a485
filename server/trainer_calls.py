"""Calls of trainers that are no more than another name, or a kept digest."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request

from ..protocol.adapters import KeepAdapters
from ..protocol.errors import Conflict, InvalidRequest
from ..protocol.operations import Adapt, CheckTensors, Digests, Update
from ..protocol.reports import Operated
from ..protocol.tensor_sources import Noise
from . import control_bodies as bodies
from .operation_client import OperationClient, first_report, success
from .routes import Route, routes_of
from .service import Service
from .weight_writing import UPDATED, updated

Snapshot = Mapping[str, Mapping[str, str]]
"""Digests by module and tensor."""

_AFTER = {"compare": "compare with", "reset_tensors": "compare with after a reset"}


def routes(service: Service) -> APIRouter:
    return routes_of(_Routes(service).table())


class _Routes:
    def __init__(self, service: Service) -> None:
        self._operations = OperationClient(service)
        self._snapshot: Snapshot | None = None

    def table(self) -> list[Route[Any]]:
        return [
            Route(
                path="/update_weight_version", handler=self.set_version, body=bodies.WeightVersion,
                summary="Call the weights that serve by another version", answer="`weight_version`, `new_version`",
            ),
            Route(
                path="/weights_checker", handler=self.check, body=bodies.WeightsChecker,
                summary="Keep digests of the weights, reset the weights, and compare",
                answer=f"`weight_version`; after a reset also {UPDATED}",
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
        if self._snapshot is None:
            raise Conflict(
                f"There is no snapshot to {_AFTER[body.action]}; send action = snapshot first.", field="action"
            )
        if body.action == "compare":
            return await self._compare(request, self._snapshot, body)
        return await self._reset(request, body)

    async def _keep(self, request: Request) -> dict[str, Any]:
        operated = await self._operations.operate(request, Digests(None, detail=True))
        report = first_report(operated)
        self._snapshot = {
            module: {name: one.sha256 for name, one in tensors.items()} for module, tensors in report.tensors.items()
        }
        count = sum(map(len, self._snapshot.values()))
        return {**success(f"The digests of {count} tensors are kept."), **self._operations.version(operated)}

    async def _reset(self, request: Request, body: bodies.WeightsChecker) -> dict[str, Any]:
        """Write noise over the weights, so that a tensor that the next update leaves out is found by comparing."""
        began = time.perf_counter()
        source = Noise(body.target_modules or ["transformer"], secrets.randbits(63), body.skip_tensor_list or [])
        operated = await self._operations.operate(request, Update(source=source))
        return updated(operated, "The weights are noise; send new ones, then action = compare.", began)

    async def _compare(self, request: Request, kept: Snapshot, body: bodies.WeightsChecker) -> dict[str, Any]:
        """Raises ``OperationFailed`` with the names of tensors that differ on any replica."""
        operated: Operated | None = None
        for module, digests in kept.items():
            if expected := {name: digest for name, digest in digests.items() if not body.skips(name)}:
                operated = await self._operations.operate(request, CheckTensors(module, expected))
        if operated is None:
            raise InvalidRequest("No tensor is left to compare.", field="skip_tensor_list")
        return {**success("All tensors are as they were."), **self._operations.version(operated)}

    async def post_process(self, request: Request, body: bodies.PostProcess) -> dict[str, Any]:
        return success("Nothing was needed: weights serve as they are written.")
