"""``POST /encode``: prompts through the text encoders alone, into the prompt cache or as embeddings."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
import orjson
from fastapi import APIRouter, Request, Response

from ..formats.tensor_files import read_header
from ..process.logs import request_id_var
from ..protocol.errors import InvalidRequest
from ..protocol.generation import Generate, Output, Result
from .answers import GENERATING, answers, request_body
from .disconnect import while_connected
from .encode_body import EncodeBody, read_encode
from .generation_response import OFF_THE_LOOP, base64_of
from .model_limits import check_model
from .plain_route import PlainRoute
from .request_context import own_id_var
from .request_validation import check_ranges, to_message
from .service import Service
from .unread import UnreadReply

_ANSWER = (
    "The weights' version, the `replicas` whose caches have the prompts and, for each prompt, the embeddings as a "
    "safetensors file in base64, if asked for"
)


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["generation"], route_class=PlainRoute)

    @router.post(
        "/encode",
        summary="Encode prompts, for later generations or to have their embeddings",
        openapi_extra=request_body(EncodeBody),
        responses=answers(_ANSWER, GENERATING),
    )
    async def encode(request: Request) -> Response:
        started_at = time.perf_counter()
        message, model = await _read(request, service)
        service.unread.make_room()
        filled = _to_fill(message, service)
        result = await while_connected(request.receive, _result(message, filled, service))
        service.unread.make_room()
        size = sum(len(output.data) for output in result.outputs)
        with service.unread.sending(size):
            write = asyncio.to_thread if size > OFF_THE_LOOP else _at_once
            reply = await write(_reply, message, model, result, filled, time.perf_counter() - started_at)
        return UnreadReply([reply], service.unread, "application/json")

    return router


async def _at_once(function: Any, *arguments: Any) -> Any:
    return function(*arguments)


async def _read(request: Request, service: Service) -> tuple[Generate, str]:
    """The checked request, and the model's name."""
    body = await read_encode(request)
    asked = body.as_generation()
    check_ranges(asked, service.config)
    if body.returns == "cache" and service.config.prompt_cache_mb == 0:
        raise InvalidRequest(
            "This server keeps no prompt cache (--prompt-cache-mb 0); ask for return = embeddings.", field="return"
        )
    model = service.link.ready_model()
    check_model(asked, 0, model, service.config)
    message = to_message(asked, [], own_id_var.get(), "pt", service.config)
    return msgspec.structs.replace(message, encode=body.returns), model.model


def _to_fill(message: Generate, service: Service) -> list[int]:
    """The replicas whose prompt caches are filled: all that are ready, or none if any one makes embeddings."""
    if message.encode != "cache":
        return []
    return [replica.replica for replica in service.link.status.replicas if replica.state == "ready"]


async def _result(message: Generate, filled: list[int], service: Service) -> Result:
    if not filled:
        return await service.link.result(message)
    first, *_ = await service.link.results(message, filled)
    return first


def _reply(message: Generate, model: str, result: Result, filled: list[int], total_s: float) -> bytes:
    outputs = [_output(sample.prompt, output) for sample, output in zip(message.samples, result.outputs, strict=True)]
    return orjson.dumps({
        "id": request_id_var.get(),
        "model": model,
        "weight_version": result.weight_version,
        "weight_versions": result.weight_versions,
        "adapters": msgspec.to_builtins(result.adapters),
        "outputs": outputs,
        "replicas": filled,
        "timings": {
            "queue_s": result.timings.queue_s,
            "encode_s": result.timings.encode_s,
            "total_s": total_s,
        },
    })  # fmt: skip


def _output(prompt: str, output: Output) -> dict[str, Any]:
    """A prompt's embeddings as a safetensors file, with the dtype and shape of each tensor in it."""
    data = memoryview(output.data.data).cast("B")
    if not data:
        return {"prompt": prompt, "b64": None, "tensors": {}}
    length = 8 + int.from_bytes(data[:8], "little")
    found = read_header(bytes(data[:length]), len(data))
    tensors = {one.name: {"dtype": one.dtype, "shape": one.shape} for one in found}
    return {"prompt": prompt, "b64": base64_of(output.data), "tensors": tensors}
