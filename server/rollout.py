"""``POST /rollout/generate``."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from ..protocol.logs import request_id_var
from ..protocol.messages import Generate, Result
from .disconnect import while_connected
from .images import read_images
from .limits import check_model, check_ranges, to_message
from .rollout_body import RolloutBody, check_rollout, read_rollout, to_rollout
from .rollout_reply import MEDIA_TYPE, Piece, in_parts, pieces
from .service import Service

_KEPT_S = 600.0
"""Seconds that a reply in shared memory is kept for a client that does not fetch it."""

_OPENAPI = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": RolloutBody.model_json_schema()} for kind in ("application/json", MEDIA_TYPE)},
    },
    "responses": {"200": {"content": {MEDIA_TYPE: {}}, "description": "A list with a map for each sample"}},
}


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["training"])
    numbers = itertools.count(1)

    @router.post("/rollout/generate", summary="Generate with log-probabilities", openapi_extra=_OPENAPI)
    async def rollout(request: Request) -> Response:
        body = await read_rollout(request)
        check_ranges(body, service.config)
        model = service.link.ready_model()
        check_rollout(body, model, service.config)
        sources = list(body.image or ())
        check_model(body, len(sources), model, service.config)
        images = await service.decode(read_images, sources, service.config.max_pixels) if sources else []
        request_id = f"{request_id_var.get()}.{next(numbers)}"
        message = to_message(body, images, request_id, "pt", service.config)
        message = msgspec.structs.replace(message, rollout=to_rollout(body, len(message.samples)))
        if body.rollout_shared_memory:
            _forget_unfetched(service.shared)
        result = await while_connected(request.receive, _result(service, message))
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
    }
    found = pieces(result.outputs, more)
    size = str(sum(map(len, found)))

    return StreamingResponse(_each(found), media_type=MEDIA_TYPE, headers={"content-length": size})


async def _each(found: list[Piece]) -> AsyncIterator[Piece]:
    """Off no thread, as nothing is computed or copied; each part waits until the connection takes it."""
    for part in in_parts(found):
        yield part


def _forget_unfetched(shared: Path) -> None:
    """Remove what clients have had time to fetch; those that did have removed it."""
    for file in shared.glob("rollout-*"):
        try:
            if time.time() - file.stat().st_mtime > _KEPT_S:
                file.unlink()
        except FileNotFoundError:  # it has just been fetched
            continue
