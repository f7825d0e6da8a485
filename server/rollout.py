"""``POST /rollout/generate``."""

from __future__ import annotations

import asyncio

import msgspec
from fastapi import APIRouter, Request, Response

from ..process.addresses import is_loopback
from ..process.logs import request_id_var
from ..protocol.config import MOST_PIXELS
from ..protocol.errors import InvalidRequest
from ..protocol.generation import Generate, Result
from .answers import GENERATING, Answers, answers, request_body
from .disconnect import while_connected
from .image_paths import read_paths
from .model_limits import check_model
from .plain_route import PlainRoute
from .request_context import own_id_var
from .request_validation import check_ranges, to_message
from .rollout_body import RolloutBody, check_rollout, read_rollout, to_rollout
from .rollout_reply import MEDIA_TYPE, pieces
from .service import Service
from .unread import KEPT_S, Unread, UnreadReply, files_of

_LATE_S = 60.0
"""Seconds after a file's expiry until the last scan: a worker may still write files for a request that has ended."""

_SHARED = "rollout_shared_memory"


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["training"], route_class=PlainRoute)
    unread = service.unread

    @router.post(
        "/rollout/generate",
        summary="Generate with log-probabilities",
        openapi_extra=request_body(RolloutBody, "application/json", MEDIA_TYPE),
        responses=_answers(),
    )
    async def generate(request: Request) -> Response:
        message = await _read(request, service)
        unread.make_room()
        try:
            result = await while_connected(request.receive, service.link.result(message))
        finally:
            if message.rollout is not None and message.rollout.shared_memory:
                asyncio.get_running_loop().call_later(KEPT_S + _LATE_S, unread.sweep)
        service.metrics.count_outputs(len(result.outputs))
        unread.make_room(files_of(result.outputs))
        return _reply(result, unread)

    return router


def _answers() -> Answers:
    found = answers("A list with a map for each sample", GENERATING)
    found[200]["content"] = {MEDIA_TYPE: {}}
    return found


async def _read(request: Request, service: Service) -> Generate:
    """The checked request. Nothing of its body is left, which can be far larger than the pictures in it."""
    body = await read_rollout(request)
    check_ranges(body, service.config)
    model = service.link.ready_model()
    check_rollout(body, model, service.config)
    sources: list[str | bytes] = [*(body.image or ())]
    if body.image_path is not None:
        sources += await asyncio.to_thread(read_paths, body.image_path, service.config)
    check_model(body, len(sources), model, service.config)
    images = await service.pictures.read(sources, service.config.max_pixels or MOST_PIXELS) if sources else []
    message = to_message(body, images, own_id_var.get(), "pt", service.config)
    rollout = await asyncio.to_thread(to_rollout, body, len(message.samples))
    if rollout.shared_memory:
        _check_near(request)
    return msgspec.structs.replace(message, rollout=rollout)


def _reply(result: Result, unread: Unread) -> Response:
    more = {
        "request_id": request_id_var.get(),
        "weight_version": result.weight_version,
        "weight_versions": result.weight_versions,
        "adapters": msgspec.to_builtins(result.adapters),
    }
    return UnreadReply(pieces(result.outputs, more), unread, MEDIA_TYPE, files=files_of(result.outputs))


def _check_near(request: Request) -> None:
    """Raises ``InvalidRequest`` unless the client is on this machine: nobody else can fetch the files."""
    host = request.client.host if request.client is not None else ""
    if not is_loopback(host):
        raise InvalidRequest("Only a client on the server's machine can have shared memory.", field=_SHARED)
