"""The routes for LoRA adapters."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from ..protocol.adapters import (
    ALL,
    SENT,
    AdapterSource,
    AdapterState,
    MergeAdapters,
    SetAdapters,
    UnloadAdapter,
    UnmergeAdapters,
    WantedMode,
)
from ..protocol.errors import InvalidRequest
from ..protocol.operations import Adapt, Barrier, ListAdapters
from ..protocol.reports import Operated
from .adapter_files import copy_adapter
from .answers import OPERATING, answers
from .body_types import Alpha, Name, Path
from .body_validation import Body
from .control_bodies import Nothing
from .operation_client import OperationClient, active_adapters, first_report
from .replies import json_reply
from .routes import Route
from .service import Service
from .subscription import OperationFailed

Names = Annotated[list[Name], Field(min_length=1, max_length=64)]


class SetLora(
    Body, json_schema_extra={"example": {"lora_nickname": "style", "lora_path": "/adapters/style", "strength": 0.8}}
):
    """Each of the other fields may be a list, with one for each nickname."""

    lora_nickname: Name | Names
    lora_path: Path | list[Path | None] | None = Field(None, description="Where it is; omitted for one that is loaded")
    target: Name | list[Name] = Field(ALL, description="The component that it is for")
    strength: float | list[float] = 1.0
    merge_mode: WantedMode | None = None
    lora_alpha: Alpha | list[Alpha | None] | None = Field(None, description="In place of the value in its files")
    mode: Barrier | None = None
    strict: bool = Field(True, description="Refuse an adapter that has layers which the model does not have")


class Merge(Body, json_schema_extra={"example": {"target": "transformer", "strength": 0.8}}):
    target: Name = ALL
    strength: float | list[float] | None = None
    mode: Barrier = "wait"


class Unmerge(Body, json_schema_extra={"example": {"target": "transformer"}}):
    target: Name = ALL
    mode: Barrier = "wait"


class Unload(Body, json_schema_extra={"example": {"lora_nickname": "style"}}):
    lora_nickname: Name
    mode: Barrier = "wait"


class Listed(BaseModel):
    loaded_adapters: list[dict[str, Any]]
    active: dict[str, list[dict[str, Any]]]


class Changed(Listed):
    status: Literal["ok"]
    message: str
    weight_version: str | None


_CHANGED = "What there is after the change, and sentences about it"


def routes(service: Service) -> APIRouter:
    """The routes that change which adapters there are."""
    handlers = _Routes(service)
    return _router(
        Route(
            path="/set_lora", handler=handlers.set, body=SetLora, answer=_CHANGED,
            summary="Load adapters and have them active",
        ),
        Route(
            path="/merge_lora_weights", handler=handlers.merge, body=Merge, answer=_CHANGED,
            summary="Merge active adapters into the weights",
        ),
        Route(
            path="/unmerge_lora_weights", handler=handlers.unmerge, body=Unmerge, answer=_CHANGED,
            summary="Take merged adapters out, with every byte as before",
        ),
        Route(
            path="/unload_lora", handler=handlers.unload, body=Unload, answer=_CHANGED, summary="Unload an adapter"
        ),
        method="POST", reply=Changed,
    )  # fmt: skip


def reading_routes(service: Service) -> APIRouter:
    listing = Route(
        path="/list_loras", handler=_Routes(service).list, body=Nothing, answer="Adapters by nickname and by component",
        summary="The adapters that are loaded, and those that are active",
    )  # fmt: skip
    return _router(listing, method="GET", reply=Listed)


def _router(*table: Route[Any], method: str, reply: type[BaseModel]) -> APIRouter:
    """Each route with and without ``/v1``."""
    router = APIRouter(tags=["adapters"])
    for route in table:
        for path in (f"/v1{route.path}", route.path):
            router.add_api_route(
                path,
                _replying(route),
                name=route.path.strip("/"),
                methods=[method],
                summary=route.summary,
                include_in_schema=path.startswith("/v1/"),
                openapi_extra=route.described(method),
                responses=answers(route.answer, (404, *OPERATING), reply=reply),
            )
    return router


def _replying(route: Route[Any]) -> Callable[..., Awaitable[Response]]:
    async def reply(request: Request) -> Response:
        try:
            return json_reply(await route(request))
        except OperationFailed as failed:
            raise failed.error from failed

    return reply


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._operations = OperationClient(service)

    async def set(self, request: Request, body: SetLora) -> dict[str, Any]:
        nicknames = [body.lora_nickname] if isinstance(body.lora_nickname, str) else body.lora_nickname
        if len(set(nicknames)) < len(nicknames):
            raise InvalidRequest("A nickname is given twice.", field="lora_nickname")
        if body.lora_path is not None and any(nickname.startswith(SENT) for nickname in nicknames):
            raise InvalidRequest(f"{SENT} is the nickname of adapters that are sent as tensors.", field="lora_nickname")
        paths = _each(body.lora_path, nicknames, "lora_path") if body.lora_path is not None else [None] * len(nicknames)
        targets = _each(body.target, nicknames, "target")
        alphas = _each(body.lora_alpha, nicknames, "lora_alpha")
        if any(alpha is not None and path is None for alpha, path in zip(alphas, paths, strict=True)):
            raise InvalidRequest("lora_alpha is for adapters that are loaded; give the path too.", field="lora_alpha")
        strengths = [_finite(number) for number in _each(body.strength, nicknames, "strength")]
        wanted = body.merge_mode or "auto"
        barrier = body.mode or ("in_place" if wanted == "request" else "wait")
        async with self._service.adapter_store.for_a_change() as new_folder:
            sources = [
                await self._copy(path, nickname, new_folder(), alpha, target, strict=body.strict)
                for nickname, path, alpha, target in zip(nicknames, paths, alphas, targets, strict=True)
                if path is not None
            ]
            change = SetAdapters(
                nicknames=nicknames, strengths=strengths, targets=targets, mode=wanted, sources=sources
            )
            operated = await self._operations.operate(request, Adapt(change), barrier)
        return _done(f"{', '.join(nicknames)} set.", operated)

    async def merge(self, request: Request, body: Merge) -> dict[str, Any]:
        given = body.strength
        strengths = None if given is None else [_finite(one) for one in (given if isinstance(given, list) else [given])]
        change = MergeAdapters(body.target, strengths)
        return _done("Merged.", await self._operations.operate(request, Adapt(change), body.mode))

    async def unmerge(self, request: Request, body: Unmerge) -> dict[str, Any]:
        operated = await self._operations.operate(request, Adapt(UnmergeAdapters(body.target)), body.mode)
        return _done("What was merged is out of the weights, with every byte as before.", operated)

    async def unload(self, request: Request, body: Unload) -> dict[str, Any]:
        async with self._service.adapter_store.for_a_change():
            operated = await self._operations.operate(request, Adapt(UnloadAdapter(body.lora_nickname)), body.mode)
        return _done(f"{body.lora_nickname} unloaded.", operated)

    async def list(self, request: Request, body: Nothing) -> dict[str, Any]:
        return _listed((await self._operations.send(request, ListAdapters)).adapters)

    async def _copy(
        self, path: str, nickname: str, folder: pathlib.Path, alpha: float | None, target: str, *, strict: bool
    ) -> AdapterSource:
        return await self._service.decode(
            copy_adapter, path, nickname, folder, self._service.config, alpha=alpha, target=target, strict=strict
        )


def _each(given: Any, nicknames: list[str], field: str) -> list[Any]:
    """A value for each nickname. One alone is for all of them, but for a path."""
    values = given if isinstance(given, list) else [given] * (1 if field == "lora_path" else len(nicknames))
    if len(values) != len(nicknames):
        raise InvalidRequest(f"There are {len(nicknames)} nicknames and {len(values)} of {field}.", field=field)
    return values


def _finite(strength: float) -> float:
    if not (math.isfinite(strength) and abs(strength) <= 100):
        raise InvalidRequest("A strength is a number within ±100.", field="strength")
    return strength


def _done(message: str, operated: Operated) -> dict[str, Any]:
    report = first_report(operated)
    summary = " ".join([message, *report.notes])
    return {"status": "ok", "message": summary, **_listed(operated.adapters), "weight_version": operated.weight_version}


def _listed(state: AdapterState) -> dict[str, Any]:
    loaded = [
        {
            "nickname": nickname,
            "path": one.source.path,
            "rank": one.rank,
            "alpha": one.alpha,
            "bytes": one.nbytes,
            "components": one.components,
            "left": one.left,
        }
        for nickname, one in state.loaded.items()
    ]
    return {"loaded_adapters": loaded, "active": active_adapters(state)}
