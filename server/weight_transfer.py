"""The four phases of vLLM's interface for training: this server's own transactions under other names.

A trainer joins a process group once; then, for each version, it begins an update, broadcasts tensors over the group,
and ends the update. There is one group and one update of this kind at a time, and the server remembers which. A body
is read as that of the route that it stands for, which does the rest.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field, WithJsonSchema

from ..protocol.errors import Conflict, InvalidRequest, SafelightError
from ..protocol.operations import Abort, Barrier, Continue, Leave, Operation, Pause
from . import weight_bodies as bodies
from .body_types import Version
from .body_validation import Body, from_query, validate, without_nulls
from .control_bodies import Nothing
from .operation_client import OperationClient, success
from .routes import Route, routes_of
from .service import Service
from .subscription import OperationFailed
from .weight_groups import GroupRoutes
from .weights import WeightRoutes

GROUP = "weight_transfer"
"""The group of these routes, as the others name it."""

_OF_PACKING = ("packed", "packed_buffer_size_bytes", "packed_num_buffers", "is_checkpoint_format")
_CHECKPOINT_NAMES = "Tensors come under their checkpoint's names; give is_checkpoint_format = true."

_OBJECT = WithJsonSchema({"type": "object"})
_GROUP = {"master_address": "10.0.0.1", "master_port": 29500, "rank_offset": 1, "world_size": 2}
_TENSORS = {"names": ["proj_out.weight"], "dtype_names": ["bfloat16"], "shapes": [[64, 256]]}

_MODES: dict[str, Barrier] = {"keep": "in_place", "wait": "wait", "abort": "abort"}


class PauseQuery(Body):
    """Caches are kept right by themselves, so nothing is done to ``clear_cache``."""

    mode: Literal["keep", "wait", "abort"] = "abort"
    wait_for_inflight_requests: bool = False
    clear_cache: bool = True


class WorldQuery(Body):
    include_dp: bool = Field(True, description="The ranks of all replicas, and not of one")


class Join(Body, extra="allow", json_schema_extra={"example": {"init_info": _GROUP}}):
    """Fields as of /init_weights_update_group, here or in ``init_info``; the group has a name of its own."""

    init_info: Annotated[Any, _OBJECT] = Field({}, examples=[_GROUP])


class StartUpdate(Body, json_schema_extra={"example": {"is_checkpoint_format": True}}):
    is_checkpoint_format: bool = Field(True, description="Only true is possible: names are those of the checkpoint")


class Part(Body, extra="allow", json_schema_extra={"example": {"update_info": _TENSORS}}):
    """Fields as of /update_weights_from_distributed, but ``dtype_names``, here or in ``update_info``."""

    update_info: Annotated[Any, _OBJECT] = Field({}, examples=[_TENSORS])


class FinishUpdate(Body, json_schema_extra={"example": {"weight_version": "100"}}):
    weight_version: Version | None = None


def routes(service: Service) -> APIRouter:
    handlers = _Routes(service)
    return routes_of(
        [
            Route(
                path="/pause", handler=handlers.pause, body=Nothing, query=PauseQuery, answer="`status`",
                summary="Stop generation; requests wait (mode keep or wait) or are aborted (abort)",
            ),
            Route(path="/resume", handler=handlers.resume, body=Nothing, summary="Go on", answer="`status`"),
            Route(
                path="/init_weight_transfer_engine", handler=handlers.join, body=Join, answer="`ranks`",
                summary="Join the trainer's process group", max_values=bodies.TENSORS,
            ),
            Route(
                path="/start_weight_update", handler=handlers.start, body=StartUpdate, summary="Begin an update",
                answer="`update_id`",
            ),
            Route(
                path="/update_weights", handler=handlers.update, body=Part, summary="Write what the trainer broadcasts",
                answer="As of /update_weights_from_distributed", max_values=bodies.TENSORS,
                refused=lambda raw: handlers.end_group(),
            ),
            Route(
                path="/finish_weight_update", handler=handlers.finish, body=FinishUpdate,
                summary="End the update, so that its weights serve", answer="As of /commit_weights_update",
            ),
        ]
    )  # fmt: skip


def reading_routes(service: Service) -> APIRouter:
    """The routes that change nothing."""
    handlers = _Routes(service)
    return routes_of(
        [
            Route(
                path="/is_paused", handler=handlers.is_paused, body=Nothing, answer="`is_paused`",
                summary="Whether generation is paused, or the server asleep",
            ),
            Route(
                path="/get_world_size", handler=handlers.world_size, body=Nothing, query=WorldQuery,
                answer="`world_size`", summary="How many ranks join a trainer's process group",
            ),
        ],
        "GET",
    )  # fmt: skip


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._weights = WeightRoutes(service)
        self._groups = GroupRoutes(service)
        self._operations = OperationClient(service)
        self._update_id: str | None = None

    async def pause(self, request: Request, body: Nothing) -> dict[str, Any]:
        query = from_query(request, PauseQuery)
        mode = "wait" if query.wait_for_inflight_requests else query.mode
        await self._operations.send(request, lambda request_id: Pause(request_id, _MODES[mode]))
        return {**success("Generation is paused; requests wait."), "status": "paused"}

    async def resume(self, request: Request, body: Nothing) -> dict[str, Any]:
        await self._operations.send(request, Continue)
        return {**success("Generation goes on."), "status": "resumed"}

    async def is_paused(self, request: Request, body: Nothing) -> dict[str, Any]:
        return {"is_paused": self._service.link.status.halted in ("paused", "asleep")}

    async def world_size(self, request: Request, body: Nothing) -> dict[str, Any]:
        config = self._service.config
        every = from_query(request, WorldQuery).include_dp
        return {"world_size": config.world_size if every else config.replica_ranks}

    async def join(self, request: Request, body: Join) -> dict[str, Any]:
        """A trainer that comes again has left the group of before."""
        fields = _flat(body, "init_info")
        await self._done_or_not_there(request, Leave(GROUP))
        backend = "nccl" if self._service.model().device.startswith("cuda") else "gloo"
        group = validate({"backend": backend, **fields, "group_name": GROUP}, bodies.InitGroup)
        return await self._groups.init_group(request, group)

    async def start(self, request: Request, body: StartUpdate) -> dict[str, Any]:
        """Abort an update that a trainer began earlier and did not end."""
        if not body.is_checkpoint_format:
            raise InvalidRequest(_CHECKPOINT_NAMES, field="is_checkpoint_format")
        if self._update_id is not None:
            await self._done_or_not_there(request, Abort(self._update_id))
        begun = await self._weights.begin(request, validate({"mode": "in_place"}, bodies.Begin))
        self._update_id = begun["update_id"]
        return begun

    async def update(self, request: Request, body: Part) -> dict[str, Any]:
        """Part of the update that was started, or one of its own. One that is refused ends the group."""
        try:
            part = await asyncio.to_thread(_broadcast, body, self._update_id)
        except SafelightError:
            self.end_group()
            raise
        return await self._groups.from_distributed(request, part)

    def end_group(self) -> None:
        self._operations.without_reply(Leave(GROUP))

    async def finish(self, request: Request, body: FinishUpdate) -> dict[str, Any]:
        if self._update_id is None:
            raise Conflict("No update is begun; send /start_weight_update first.")
        fields = without_nulls({"update_id": self._update_id, "weight_version": body.weight_version})
        committed = await self._weights.commit(request, validate(fields, bodies.Commit))
        self._update_id = None  # one that is refused stays begun, and the next start aborts it
        return committed

    async def _done_or_not_there(self, request: Request, operation: Operation) -> None:
        try:
            await self._operations.operate(request, operation)
        except OperationFailed as failed:
            if failed.error.info().status != 404:
                raise


def _broadcast(body: Part, update_id: str | None) -> bodies.FromDistributed:
    fields = _unpacked(_flat(body, "update_info"))
    named = {("dtypes" if name == "dtype_names" else name): value for name, value in fields.items()}
    part = {} if update_id is None else {"update_id": update_id}
    return validate({**named, **part, "group_name": GROUP}, bodies.FromDistributed)


def _flat(body: Body, nested: str) -> dict[str, Any]:
    """The body's fields, and those of the object ``nested`` in it. Raises ``InvalidRequest`` for any other."""
    inner = getattr(body, nested)
    if not isinstance(inner, dict):
        raise InvalidRequest(f"{nested} must be an object.", field=nested)
    return without_nulls({**(body.model_extra or {}), **inner})


def _unpacked(fields: dict[str, Any]) -> dict[str, Any]:
    """``fields`` without those that say how tensors are packed. Raises ``InvalidRequest`` for ones that are."""
    if fields.get("packed"):
        raise InvalidRequest(
            "Tensors are received one by one; send packed = false. The group was destroyed.", field="packed"
        )
    if fields.get("is_checkpoint_format") is False:
        raise InvalidRequest(f"{_CHECKPOINT_NAMES} The group was destroyed.", field="is_checkpoint_format")
    return {name: value for name, value in fields.items() if name not in _OF_PACKING}
