"""Write weights and adapters that come as tensors from any source, and describe the result."""

from __future__ import annotations

import time
from typing import Any

from fastapi import Request

from ..protocol.operations import Update
from ..protocol.reports import Operated
from ..protocol.tensor_sources import Source
from . import weight_bodies as bodies
from .adapter_parts import AdapterParts
from .operation_client import OperationClient, active_adapters, first_report, success
from .service import Service

UPDATED = (
    "`updated` by module, `applied` and `expected` tensors, `left_out`, `weight_version`, `ranks`, `elapsed_s`, "
    "`invalidated` caches, active `adapters`, and whether they are `serving`"
)
"""The description of an update's reply."""


class WeightWriting:
    """Has replicas write tensors, or merge them where they are an adapter's."""

    def __init__(self, service: Service, operations: OperationClient) -> None:
        self._operations = operations
        self._parts = AdapterParts(service, operations)

    async def merge(self, request: Request, source: Source, target: str, body: bodies.LoraBody) -> dict[str, Any]:
        began = time.perf_counter()
        body.check()
        merged = await self._parts.merge(request, source, target, body)
        return {**updated(merged.operated, merged.message, began), "waiting": merged.waiting}

    async def update(
        self, request: Request, source: Source, body: bodies.UpdateBody, *, require_complete: bool = False
    ) -> dict[str, Any]:
        began = time.perf_counter()
        body.check()
        operation = Update(
            source=source,
            weight_version=body.weight_version,
            update_id=body.update_id,
            require_complete=require_complete,
        )
        operated = await self._operations.operate(request, operation, body.mode)
        return updated(operated, "The weights are updated." if body.update_id is None else "Written.", began)


def updated(operated: Operated, message: str, began: float) -> dict[str, Any]:
    report = first_report(operated)
    return {
        **success(f"{message}{_unable(operated)}"),
        "serving": operated.unable is None and not operated.asleep,
        "updated": report.updated,
        "applied": sum(report.updated.values()),
        "expected": sum(report.expected.values()),
        "unknown": [],
        "left_out": report.left_out,
        "invalid": [],
        "weight_version": report.weight_version or operated.weight_version,
        "ranks": sum(report.ranks for report in operated.reports.values()),
        "elapsed_s": round(time.perf_counter() - began, 6),
        "invalidated": report.invalidated,
        "adapters": active_adapters(operated.adapters),
    }


def _unable(operated: Operated) -> str:
    """The reason why the new weights do not serve yet."""
    if operated.unable is not None:
        return f" The server cannot serve yet: {operated.unable}."
    return " The server is asleep." if operated.asleep else ""
