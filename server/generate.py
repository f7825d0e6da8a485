"""``POST /generate``."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response

from ..process.logs import request_id_var
from ..protocol.config import MOST_PIXELS
from ..protocol.errors import InvalidRequest
from ..protocol.generation import Generate, Result
from ..protocol.output_formats import FORMATS
from . import content_negotiation
from .answers import GENERATING, answers, request_body
from .body import FORM, read_generate
from .disconnect import while_connected
from .event_stream import EventStream
from .generation_response import Reply
from .model_limits import check_model
from .plain_route import PlainRoute
from .request_context import own_id_var
from .request_validation import check_ranges, to_message
from .schemas import GenerateBody
from .service import Service
from .unread import UnreadReply

_BODIES = ("application/json", FORM)
_ANSWER = "The outputs in base64; with an Accept header that names its type, the output itself; or events, if streamed"


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["generation"], route_class=PlainRoute)

    @router.post(
        "/generate",
        summary="Make pictures or videos from a prompt",
        openapi_extra=request_body(GenerateBody, *_BODIES),
        responses=answers(_ANSWER, GENERATING),
    )
    async def generate(request: Request) -> Response:
        started_at = time.perf_counter()
        asked = await _read(request, service)
        message = asked.message

        def finish(result: Result) -> Reply:
            service.metrics.count_outputs(len(result.outputs))
            return Reply(request_id_var.get(), asked.model, message, result, time.perf_counter() - started_at)

        async def finish_event(result: Result) -> bytes:
            return await finish(result).as_json(service.unread)

        service.unread.make_room()
        if asked.stream:
            return EventStream(service.link, message, finish_event, service.unread)
        reply = finish(await while_connected(request.receive, service.link.result(message)))
        service.unread.make_room()
        if asked.as_file:
            return reply.as_file(service.unread)
        return UnreadReply([await reply.as_json(service.unread)], service.unread, "application/json")

    return router


@dataclass(frozen=True)
class _Asked:
    message: Generate
    model: str
    stream: bool
    as_file: bool


async def _read(request: Request, service: Service) -> _Asked:
    """The checked request. Nothing of its body is left, which can be far larger than the pictures in it."""
    body, sources = await read_generate(request)
    check_ranges(body, service.config)
    model = service.link.ready_model()
    check_model(body, len(sources), model, service.config)
    as_file, output_format = content_negotiation.choose(request.headers.get("accept"), body.output_format, model.kind)
    images = await service.pictures.read(sources, service.config.max_pixels or MOST_PIXELS) if sources else []
    message = to_message(body, images, own_id_var.get(), output_format, service.config)
    if as_file and not body.stream and len(message.samples) != 1:
        raise InvalidRequest(
            f"An answer of the type {FORMATS[output_format].media_type} holds one output, and this request makes "
            f"{len(message.samples)}; accept application/json, or ask for one."
        )
    return _Asked(message, model.model, body.stream, as_file)
