"""The post-training routes for what generation does while a trainer needs the device: sleep, pause, abort, flush."""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter, Request

from ..protocol.errors import InvalidRequest
from ..protocol.operations import CACHES, WEIGHTS, AbortRequests, Continue, Flush, Pause, Sleep, Wake
from . import weight_bodies as bodies
from .operating import Handler, Operating, first_report, routes_of, success
from .service import Service

_OWN_ID = re.compile(r"(.+\.)?[0-9a-f]{32}")

_CACHES = ("kv_cache", "cuda_graph")
"""What other servers call caches."""


def routes(service: Service) -> APIRouter:
    handlers = _Routes(service)
    router = routes_of(handlers.table())
    router.include_router(routes_of([("/flush_cache", handlers.flush, "The same, for who asks so")], "GET"))
    return router


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._operating = Operating(service)

    def table(self) -> list[tuple[str, Handler, str]]:
        return [
            ("/release_memory_occupation", self.release, "Sleep: give memory back"),
            ("/resume_memory_occupation", self.resume, "Wake: every byte is there again"),
            ("/pause_generation", self.pause, "Stop generation; requests wait"),
            ("/continue_generation", self.go_on, "Go on"),
            ("/abort_request", self.abort_request, "End one request, or all"),
            ("/flush_cache", self.flush, "Forget what could be made again"),
        ]

    async def release(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.Occupation)
        await self._operating.operate(request, Sleep(self._tags(body)), "wait")
        return {**success("The server is asleep."), "sleeping": True}

    async def resume(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.Occupation)
        operated = await self._operating.operate(request, Wake(self._tags(body)))
        return {**success("What was asked for is awake."), "sleeping": bool(operated.asleep)}

    def _tags(self, body: bodies.Occupation) -> list[str]:
        """Names of modules, and ``caches``; all of them where the body names none. Raises ``InvalidRequest``."""
        modules = list(self._service.model().parameters)
        found: dict[str, None] = {}
        for tag in body.tags or (WEIGHTS, CACHES):
            if tag not in (WEIGHTS, CACHES, *_CACHES, *modules):
                raise InvalidRequest(
                    f"There is no tag {tag[:100]!r}; there are {WEIGHTS}, {CACHES} and {', '.join(modules)}.",
                    field="tags",
                )
            meant = modules if tag == WEIGHTS else [tag if tag in modules else CACHES]
            found |= dict.fromkeys(meant)
        return list(found)

    async def pause(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.PauseGeneration)
        await self._operating.send(request, lambda request_id: Pause(request_id, body.barrier))
        return success("Generation is paused; requests wait.")

    async def go_on(self, request: Request) -> dict[str, Any]:
        await bodies.read(request, bodies.Nothing)
        await self._operating.send(request, Continue)
        return success("Generation goes on.")

    async def abort_request(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.AbortRequest)
        if body.every == (body.name is not None):
            raise InvalidRequest("Give either request_id or all = true.", field="request_id")
        exact = self._service.config.api_key is None
        if exact and body.name is not None and not _OWN_ID.fullmatch(body.name):
            raise InvalidRequest(
                "Without an API key, anybody could have chosen that X-Request-Id; give the X-Safelight-Id that came "
                "with the reply's headers, or all = true.",
                field="request_id",
            )
        await self._operating.send(request, lambda request_id: AbortRequests(request_id, body.name, exact))
        return success("What was running under that name is ended.")

    async def flush(self, request: Request) -> dict[str, Any]:
        await bodies.read(request, bodies.Nothing)
        operated = await self._operating.operate(request, Flush())
        return {
            **success("The caches are empty."),
            "invalidated": first_report(operated).invalidated,
        }
