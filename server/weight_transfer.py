"""The four phases of vLLM's interface for training: this server's own transactions under other names.

A trainer joins a process group once; then, for each version, it begins an update, broadcasts tensors over the group,
and ends the update. There is one group and one update of this kind at a time, and the server remembers which. A body
is written anew with the names of the route that it stands for, which does the rest.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Request
from starlette.types import Message

from ..protocol.errors import Conflict, InvalidRequest, SafelightError
from ..protocol.operations import Abort, Barrier, Continue, Leave, Operation, Pause
from . import weight_bodies as bodies
from .operating import Operating, routes_of, success
from .scheduler_link import OperationFailed
from .service import Service
from .weights import WeightRoutes

GROUP = "weight_transfer"
"""The group of these routes, as the others name it."""

_OF_PACKING = ("packed", "packed_buffer_size_bytes", "packed_num_buffers", "is_checkpoint_format")
_CHECKPOINT_NAMES = "Tensors come under their checkpoint's names; give is_checkpoint_format = true."

_MODES: dict[str, Barrier] = {"keep": "in_place", "wait": "wait", "abort": "abort"}


class PauseQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Caches are kept right by themselves, so nothing is done to ``clear_cache``."""

    mode: Literal["keep", "wait", "abort"] = "abort"
    wait_for_inflight_requests: bool = False
    clear_cache: bool = True


class WorldQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    include_dp: bool = True


class StartUpdate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    is_checkpoint_format: bool = True


class FinishUpdate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    weight_version: bodies.Version | None = None


def routes(service: Service) -> APIRouter:
    handlers = _Routes(service)
    return routes_of(
        [
            ("/pause", handlers.pause, "Stop generation; requests wait (mode keep or wait) or are ended (abort)"),
            ("/resume", handlers.resume, "Go on"),
            ("/init_weight_transfer_engine", handlers.join, "Join the trainer's process group"),
            ("/start_weight_update", handlers.start, "Begin an update"),
            ("/update_weights", handlers.update, "Write what the trainer broadcasts"),
            ("/finish_weight_update", handlers.finish, "End the update, so that its weights serve"),
        ]
    )


def reading_routes(service: Service) -> APIRouter:
    """Those that change nothing."""
    handlers = _Routes(service)
    return routes_of(
        [
            ("/is_paused", handlers.is_paused, "Whether generation is paused, or the server asleep"),
            ("/get_world_size", handlers.world_size, "How many ranks join a trainer's process group"),
        ],
        "GET",
    )


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._weights = WeightRoutes(service)
        self._operating = Operating(service)
        self._update_id: str | None = None

    async def pause(self, request: Request) -> dict[str, Any]:
        query = bodies.from_query(request, PauseQuery)
        await bodies.read(request, bodies.Nothing)
        mode = "wait" if query.wait_for_inflight_requests else query.mode
        await self._operating.send(request, lambda request_id: Pause(request_id, _MODES[mode]))
        return {**success("Generation is paused; requests wait."), "status": "paused"}

    async def resume(self, request: Request) -> dict[str, Any]:
        await bodies.read(request, bodies.Nothing)
        await self._operating.send(request, Continue)
        return {**success("Generation goes on."), "status": "resumed"}

    async def is_paused(self, request: Request) -> dict[str, Any]:
        return {"is_paused": self._service.link.status.halted in ("paused", "asleep")}

    async def world_size(self, request: Request) -> dict[str, Any]:
        config = self._service.config
        every = bodies.from_query(request, WorldQuery).include_dp
        return {"world_size": config.tp * (config.replicas if every else 1)}

    async def join(self, request: Request) -> dict[str, Any]:
        """A trainer that comes again has left the group of before."""
        fields = await _flat(request, "init_info")
        await self._done_or_not_there(request, Leave(GROUP))
        backend = "nccl" if self._service.model().device.startswith("cuda") else "gloo"
        return await self._weights.init_group(
            _written_anew(request, {"backend": backend, **fields, "group_name": GROUP})
        )

    async def start(self, request: Request) -> dict[str, Any]:
        """What a trainer had begun before and not ended is aborted."""
        body = await bodies.read(request, StartUpdate)
        if not body.is_checkpoint_format:
            raise InvalidRequest(_CHECKPOINT_NAMES, field="is_checkpoint_format")
        if self._update_id is not None:
            await self._done_or_not_there(request, Abort(self._update_id))
        begun = await self._weights.begin(_written_anew(request, {"mode": "in_place"}))
        self._update_id = begun["update_id"]
        return begun

    async def update(self, request: Request) -> dict[str, Any]:
        """Part of the update that was started, or one of its own. One that is refused ends the group."""
        try:
            fields = _unpacked(await _flat(request, "update_info"))
        except SafelightError:
            self._operating.without_reply(Leave(GROUP))
            raise
        named = {("dtypes" if name == "dtype_names" else name): value for name, value in fields.items()}
        part = {} if self._update_id is None else {"update_id": self._update_id}
        return await self._weights.from_distributed(_written_anew(request, {**named, **part, "group_name": GROUP}))

    async def finish(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, FinishUpdate)
        if self._update_id is None:
            raise Conflict("No update is begun; send /start_weight_update first.")
        fields = {"update_id": self._update_id, "weight_version": body.weight_version}
        committed = await self._weights.commit(_written_anew(request, fields))
        self._update_id = None  # one that is refused stays begun, and the next start aborts it
        return committed

    async def _done_or_not_there(self, request: Request, operation: Operation) -> None:
        try:
            await self._operating.operate(request, operation)
        except OperationFailed as failed:
            if failed.error.info().status != 404:
                raise


async def _flat(request: Request, nested: str) -> dict[str, Any]:
    """The body's fields, and those of the object ``nested`` in it. Raises ``InvalidRequest`` for any other."""
    fields = await bodies.read_any(request, bodies.TENSORS)
    inner = fields.pop(nested, {})
    if not isinstance(inner, dict):
        raise InvalidRequest(f"{nested} must be an object.", field=nested)
    return {**fields, **inner}


def _unpacked(fields: dict[str, Any]) -> dict[str, Any]:
    """``fields`` without those that say how tensors are packed. Raises ``InvalidRequest`` for ones that are."""
    if fields.get("packed"):
        raise InvalidRequest(
            "Tensors are received one by one; send packed = false. The group is ended.", field="packed"
        )
    if fields.get("is_checkpoint_format") is False:
        raise InvalidRequest(f"{_CHECKPOINT_NAMES} The group is ended.", field="is_checkpoint_format")
    return {name: value for name, value in fields.items() if name not in _OF_PACKING}


def _written_anew(request: Request, fields: dict[str, Any]) -> Request:
    """``request``, whose body was read, with another one."""
    unread: list[Message] = [{"type": "http.request", "body": msgspec.json.encode(fields), "more_body": False}]

    async def receive() -> Message:
        return unread.pop() if unread else await request.receive()

    return Request(request.scope, receive)
