"""The routes for LoRA adapters."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import Meta

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
from .operating import Operating, active_adapters, first_report
from .replies import json_reply
from .scheduler_link import OperationFailed
from .service import Service
from .weight_bodies import Alpha, Name, Nothing, read
from .weight_bodies import Path as FilePath

Handler = Callable[[Request], Awaitable[dict[str, Any]]]
_Route = tuple[str, Handler, str, str]
Names = Annotated[list[Name], Meta(min_length=1, max_length=64)]


class SetLora(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    lora_nickname: Name | Names
    lora_path: FilePath | list[FilePath | None] | None = None
    target: Name | list[Name] = ALL
    strength: float | list[float] = 1.0
    merge_mode: WantedMode | None = None
    lora_alpha: Alpha | list[Alpha | None] | None = None
    mode: Barrier | None = None
    strict: bool = True


class Merge(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    target: Name = ALL
    strength: float | list[float] | None = None
    mode: Barrier = "wait"


class Unmerge(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    target: Name = ALL
    mode: Barrier = "wait"


class Unload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    lora_nickname: Name
    mode: Barrier = "wait"


def routes(service: Service) -> APIRouter:
    """The routes that change which adapters there are."""
    handlers = _Routes(service)
    table: list[_Route] = [
        ("set_lora", handlers.set, "POST", "Load adapters and have them active"),
        ("merge_lora_weights", handlers.merge, "POST", "Merge active adapters into the weights"),
        ("unmerge_lora_weights", handlers.unmerge, "POST", "Take merged adapters out, with every byte as before"),
        ("unload_lora", handlers.unload, "POST", "Let go of an adapter"),
    ]
    return _router(table)


def reading_routes(service: Service) -> APIRouter:
    return _router(
        [("list_loras", _Routes(service).list, "GET", "The adapters that are loaded, and those that are active")]
    )


def _router(table: list[_Route]) -> APIRouter:
    """``table`` has names, what answers them, methods, and lines for the reference."""
    router = APIRouter(tags=["adapters"])
    for name, handler, method, summary in table:
        for path in (f"/v1/{name}", f"/{name}"):
            shown = path.startswith("/v1/")
            router.add_api_route(path, _replying(handler), methods=[method], summary=summary, include_in_schema=shown)
    return router


def _replying(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def reply(request: Request) -> Response:
        try:
            return json_reply(await handler(request))
        except OperationFailed as failed:
            raise failed.error from failed

    reply.__annotations__ = {"request": Request, "return": Response}
    return reply


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._operating = Operating(service)

    async def set(self, request: Request) -> dict[str, Any]:
        body = await read(request, SetLora)
        nicknames = [body.lora_nickname] if isinstance(body.lora_nickname, str) else body.lora_nickname
        if len(set(nicknames)) < len(nicknames):
            raise InvalidRequest("A nickname is given twice.", field="lora_nickname")
        if body.lora_path is not None and any(nickname.startswith(SENT) for nickname in nicknames):
            raise InvalidRequest(f"{SENT} is the name of what comes as tensors.", field="lora_nickname")
        paths = _each(body.lora_path, nicknames, "lora_path") if body.lora_path is not None else [None] * len(nicknames)
        targets = _each(body.target, nicknames, "target")
        alphas = _each(body.lora_alpha, nicknames, "lora_alpha")
        if any(alpha is not None and path is None for alpha, path in zip(alphas, paths, strict=True)):
            raise InvalidRequest("lora_alpha is for adapters that are loaded; give the path too.", field="lora_alpha")
        strengths = [_finite(number) for number in _each(body.strength, nicknames, "strength")]
        wanted = body.merge_mode or "auto"
        barrier = body.mode or ("in_place" if wanted == "request" else "wait")
        async with self._service.folders.for_a_change() as new_folder:
            sources = [
                await self._copy(path, nickname, new_folder(), alpha, target, strict=body.strict)
                for nickname, path, alpha, target in zip(nicknames, paths, alphas, targets, strict=True)
                if path is not None
            ]
            change = SetAdapters(
                nicknames=nicknames, strengths=strengths, targets=targets, mode=wanted, sources=sources
            )
            operated = await self._operating.operate(request, Adapt(change), barrier)
        return _done(f"{', '.join(nicknames)} set.", operated)

    async def merge(self, request: Request) -> dict[str, Any]:
        body = await read(request, Merge)
        given = body.strength
        strengths = None if given is None else [_finite(one) for one in (given if isinstance(given, list) else [given])]
        change = MergeAdapters(body.target, strengths)
        return _done("Merged.", await self._operating.operate(request, Adapt(change), body.mode))

    async def unmerge(self, request: Request) -> dict[str, Any]:
        body = await read(request, Unmerge)
        operated = await self._operating.operate(request, Adapt(UnmergeAdapters(body.target)), body.mode)
        return _done("What was merged is out of the weights, with every byte as before.", operated)

    async def unload(self, request: Request) -> dict[str, Any]:
        body = await read(request, Unload)
        async with self._service.folders.for_a_change():
            operated = await self._operating.operate(request, Adapt(UnloadAdapter(body.lora_nickname)), body.mode)
        return _done(f"{body.lora_nickname} unloaded.", operated)

    async def list(self, request: Request) -> dict[str, Any]:
        await read(request, Nothing)
        return _listed((await self._operating.send(request, ListAdapters)).adapters)

    async def _copy(
        self, path: str, nickname: str, folder: Path, alpha: float | None, target: str, *, strict: bool
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
    told = " ".join([message, *report.told])
    return {"status": "ok", "message": told, **_listed(operated.adapters), "weight_version": operated.weight_version}


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
