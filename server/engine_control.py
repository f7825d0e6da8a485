"""Post-training routes that control generation: sleep, wake, pause, continue, abort and flush."""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter, Request

from ..protocol.errors import InvalidRequest
from ..protocol.operations import CACHES, AbortRequests, Continue, Flush, Pause, Sleep, Wake
from . import control_bodies as bodies
from .operation_client import OperationClient, first_report, success
from .routes import Route, routes_of
from .service import Service

_OWN_ID = re.compile(r"(.+\.)?[0-9a-f]{32}")

WEIGHTS = "weights"
"""All modules."""

_CACHES = ("kv_cache", "cuda_graph")
"""Other servers' names of caches."""


def routes(service: Service) -> APIRouter:
    handlers = _Routes(service)
    router = routes_of(handlers.table())
    router.include_router(routes_of([handlers.flushing("The same as POST")], "GET"))
    return router


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._operations = OperationClient(service)

    def table(self) -> list[Route[Any]]:
        return [
            Route(
                path="/release_memory_occupation", handler=self.release, body=bodies.Occupation, answer="`sleeping`",
                summary="Sleep: release the device's memory",
            ),
            Route(
                path="/resume_memory_occupation", handler=self.resume, body=bodies.Occupation, answer="`sleeping`",
                summary="Wake up: restore every byte",
            ),
            Route(
                path="/pause_generation", handler=self.pause, body=bodies.PauseGeneration,
                summary="Pause generation; requests wait",
            ),
            Route(path="/continue_generation", handler=self.go_on, body=bodies.Nothing, summary="Continue generation"),
            Route(
                path="/abort_request", handler=self.abort_request, body=bodies.AbortRequest,
                summary="Abort one request, or all",
            ),
            self.flushing("Drop cached results that can be recomputed"),
        ]  # fmt: skip

    def flushing(self, summary: str) -> Route[Any]:
        return Route(
            path="/flush_cache", handler=self.flush, body=bodies.Nothing, answer="`invalidated` caches", summary=summary
        )

    async def release(self, request: Request, body: bodies.Occupation) -> dict[str, Any]:
        await self._operations.operate(request, Sleep(self._tags(body)), "wait")
        return {**success("The server is asleep."), "sleeping": True}

    async def resume(self, request: Request, body: bodies.Occupation) -> dict[str, Any]:
        operated = await self._operations.operate(request, Wake(self._tags(body)))
        return {**success("The requested memory is resident again."), "sleeping": bool(operated.asleep)}

    def _tags(self, body: bodies.Occupation) -> list[str]:
        """Names of modules, and ``caches``; by default all. Raises ``InvalidRequest``."""
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

    async def pause(self, request: Request, body: bodies.PauseGeneration) -> dict[str, Any]:
        await self._operations.send(request, lambda request_id: Pause(request_id, body.barrier))
        return success("Generation is paused; requests wait.")

    async def go_on(self, request: Request, body: bodies.Nothing) -> dict[str, Any]:
        await self._operations.send(request, Continue)
        return success("Generation continues.")

    async def abort_request(self, request: Request, body: bodies.AbortRequest) -> dict[str, Any]:
        if len(body.names) != (0 if body.every else 1):
            raise InvalidRequest("Give either request_id, or rid, or all = true.", field="request_id")
        name = next(iter(body.names), None)
        exact = self._service.config.api_key is None
        if exact and name is not None and not _OWN_ID.fullmatch(name):
            raise InvalidRequest(
                "Without an API key, any client could have chosen that X-Request-Id: give the X-Safelight-Id of the "
                "reply's headers, or all = true.",
                field="request_id",
            )
        await self._operations.send(request, lambda request_id: AbortRequests(request_id, name, exact))
        return success("Matching requests were aborted.")

    async def flush(self, request: Request, body: bodies.Nothing) -> dict[str, Any]:
        operated = await self._operations.operate(request, Flush())
        return {
            **success("The caches are empty."),
            "invalidated": first_report(operated).invalidated,
        }
