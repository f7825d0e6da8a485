"""Adapters that come as tensors, in one call or several: kept as a file, which outlives their sender, and merged."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from ..protocol.adapters import SENT, AdapterSource, SetAdapters
from ..protocol.errors import SafelightError
from ..protocol.operations import Adapt, Leave, Save
from ..protocol.reports import Operated
from ..protocol.tensor_sources import Broadcast, Source
from . import weight_bodies as bodies
from .operation_client import OperationClient, first_report
from .service import Service
from .subscription import OperationFailed


@dataclass(frozen=True, slots=True)
class Merged:
    """The outcome of a part: ``waiting`` are factors whose counterparts did not come yet."""

    operated: Operated
    message: str
    waiting: list[str]


class AdapterParts:
    """Has replicas keep parts of adapters, and merge what has come."""

    def __init__(self, service: Service, operations: OperationClient) -> None:
        self._folders = service.adapter_store
        self._operations = operations

    async def merge(self, request: Request, source: Source, target: str, body: bodies.LoraBody) -> Merged:
        """Add a part, and merge it, unless it belongs to a begun update, which does that at its end."""
        try:
            return await self._merge(request, source, target, body)
        except (SafelightError, OperationFailed):
            if isinstance(source, Broadcast):  # or the trainer would wait in it
                self._operations.without_reply(Leave(source.group))
            raise

    async def _merge(self, request: Request, source: Source, target: str, body: bodies.LoraBody) -> Merged:
        nickname = f"{SENT}:{target}"
        async with self._folders.parts_of(body.update_id), self._folders.for_a_change() as new_folder:
            folder = new_folder()
            adapter = AdapterSource(nickname, None, str(folder), folder.name, target=target)
            save = Save(
                source=source,
                adapter=adapter,
                version=body.weight_version,
                alpha=body.lora_alpha,
                rank=body.lora_rank,
                complete=body.lora_complete,
                update_id=body.update_id,
                onto=self._folders.part(body.update_id, target),
            )
            saved = await self._operations.operate(request, save)
            report = first_report(saved)
            if body.update_id is not None:
                self._folders.keep_part(body.update_id, target, folder)
                return Merged(saved, "Kept; it is merged when the update is committed.", report.waiting)
            change = SetAdapters(
                nicknames=[nickname], strengths=[1.0], target=target, mode="merge", sources=[adapter], keeps=True
            )
            adapt = Adapt(change, publishes=True, weight_version=body.weight_version)
            operated = await self._operations.operate(request, adapt, body.mode)
        return Merged(operated, " ".join(["The adapter is merged.", *report.notes]), report.waiting)
