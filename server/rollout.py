"""``POST /rollout/generate``."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from ..protocol.errors import InvalidRequest
from ..protocol.logs import request_id_var
from ..protocol.messages import Generate, Result
from .disconnect import while_connected
from .exchange import own_id_var
from .limits import check_model, check_ranges, to_message
from .reference import body_schema
from .rollout_body import RolloutBody, check_rollout, read_rollout, to_rollout
from .rollout_reply import MEDIA_TYPE, Piece, in_parts, pieces
from .service import Service

_KEPT_S = 600.0
"""Seconds that a reply in shared memory is kept for a client that does not fetch it."""

_LATE_S = 60.0
"""And so much longer until they are looked for: a worker may still write them when a request has ended."""

_SHARED = "rollout_shared_memory"

_OPENAPI = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": body_schema(RolloutBody)} for kind in ("application/json", MEDIA_TYPE)},
    },
    "responses": {"200": {"content": {MEDIA_TYPE: {}}, "description": "A list with a map for each sample"}},
}


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["training"])

    @router.post("/rollout/generate", summary="Generate with log-probabilities", openapi_extra=_OPENAPI)
    async def generate(request: Request) -> Response:
        body = await read_rollout(request)
        check_ranges(body, service.config)
        model = service.link.ready_model()
        check_rollout(body, model, service.config)
        sources = list(body.image or ())
        check_model(body, len(sources), model, service.config)
        images = await service.pictures.read(sources, service.config.max_pixels) if sources else []
        request_id = own_id_var.get()
        message = to_message(body, images, request_id, "pt", service.config)
        rollout = await asyncio.to_thread(to_rollout, body, len(message.samples))
        message = msgspec.structs.replace(message, rollout=rollout)
        if body.rollout_shared_memory:
            _check_near(request)
        try:
            result = await while_connected(request.receive, _result(service, message))
        finally:
            if body.rollout_shared_memory:
                asyncio.get_running_loop().call_later(_KEPT_S + _LATE_S, sweep, service.shared)
        service.metrics.count_outputs(len(result.outputs))
        return _reply(result)

    return router


async def _result(service: Service, message: Generate) -> Result:
    with service.link.submit(message) as events:
        return await events.result()


def _reply(result: Result) -> Response:
    more = {
        "request_id": request_id_var.get(),
        "weight_version": result.weight_version,
        "weight_versions": result.weight_versions,
        "adapters": msgspec.to_builtins(result.adapters),
    }
    found = pieces(result.outputs, more)
    size = str(sum(map(len, found)))

    return StreamingResponse(_each(found), media_type=MEDIA_TYPE, headers={"content-length": size})


async def _each(found: list[Piece]) -> AsyncIterator[Piece]:
    """Off no thread, as nothing is computed or copied; each part waits until the connection takes it."""
    for part in in_parts(found):
        yield part


def _check_near(request: Request) -> None:
    """Raises ``InvalidRequest`` unless the client is on this machine: nobody else can fetch the files."""
    host = request.client.host if request.client is not None else ""
    if not ipaddress.ip_address(host).is_loopback:
        raise InvalidRequest("Only a client on the server's machine can have shared memory.", field=_SHARED)


def sweep(shared: Path) -> None:
    """Remove the files below ``shared`` that clients have had time to fetch; one that did has removed its own."""
    for file in shared.glob("rollout-*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > _KEPT_S:
                file.unlink()
