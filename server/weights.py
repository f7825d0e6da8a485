"""The post-training routes: weights, their digests, and what generation does meanwhile."""

from __future__ import annotations

import base64
import binascii
import functools
import itertools
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from ..protocol.codec import Buffer
from ..protocol.errors import Internal, InvalidRequest, NotFound, SafelightError
from ..protocol.logs import request_id_var
from ..protocol.operations import (
    Abort,
    AbortRequests,
    Barrier,
    Begin,
    Broadcast,
    CheckTensors,
    Commit,
    Continue,
    Digests,
    Files,
    Flush,
    Join,
    Leave,
    Operate,
    Operated,
    Operation,
    Pause,
    Pickled,
    Report,
    Sleep,
    Source,
    Update,
    Wake,
)
from . import weight_bodies as bodies
from .checkpoint_files import find_modules
from .replies import error_reply, json_reply
from .scheduler_link import OperationFailed
from .service import Service
from .uploads import Upload, shared_file

_SAFETENSORS = "application/x-safetensors"
_TAGS = ["weights", "caches"]
_GROUP_TIMEOUT_S = 60.0

Handler = Callable[[Request], Awaitable[dict[str, Any]]]


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["post-training"])
    for path, handler, summary in _Routes(service).table():
        router.add_api_route(path, _replying(handler), methods=["POST"], summary=summary)
    return router


def _replying(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """Every reply says ``success`` and ``message``; of a failure, beside the contract's error object."""

    @functools.wraps(handler)
    async def reply(request: Request) -> Response:
        try:
            told = await handler(request)
        except OperationFailed as failed:
            details = _details_of_failure(failed.report)
            return error_reply(failed.error.info(), success=False, message=failed.error.message, **details)
        except SafelightError as error:
            return error_reply(error.info(), success=False, message=error.message)
        return json_reply(told)

    reply.__annotations__ = {"request": Request, "return": Response}
    return reply


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._numbers = itertools.count(1)

    def table(self) -> list[tuple[str, Handler, str]]:
        return [
            ("/update_weights_from_disk", self.from_disk, "Load safetensors files into the running model"),
            ("/update_weights_from_tensor", self.from_tensor, "Write tensors into the running model"),
            ("/begin_weights_update", self.begin, "Begin an update of several parts"),
            ("/commit_weights_update", self.commit, "End it, so that its weights serve"),
            ("/abort_weights_update", self.abort, "End it, with every byte as before"),
            ("/init_weights_update_group", self.init_group, "Join the trainer's process group"),
            ("/update_weights_from_distributed", self.from_distributed, "Write what the trainer broadcasts"),
            ("/destroy_weights_update_group", self.destroy_group, "Leave the trainer's process group"),
            ("/update_weights_from_tensor_checker", self.check, "Compare tensors with digests"),
            ("/release_memory_occupation", self.release, "Sleep: give memory back"),
            ("/resume_memory_occupation", self.resume, "Wake: every byte is there again"),
            ("/pause_generation", self.pause, "Stop generation; requests wait"),
            ("/continue_generation", self.go_on, "Go on"),
            ("/abort_request", self.abort_request, "End one request, or all"),
            ("/flush_cache", self.flush, "Forget what could be made again"),
            ("/get_weights_checksum", self.checksum, "SHA-256 of the weights that serve"),
        ]

    async def from_disk(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.FromDisk)
        modules = await self._service.decode(find_modules, body.model_path, body.target_modules, self._service.config)
        return await self._update(Files(modules), body)

    async def from_tensor(self, request: Request) -> dict[str, Any]:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() == _SAFETENSORS:
            return await self._from_body(request)
        body = await bodies.read(request, bodies.FromTensor)
        if body.weight_update_mode is not None:
            raise InvalidRequest("LoRA adapters are not supported by this version.", field="weight_update_mode")
        if (body.shared is None) == (body.serialized_named_tensors is None):
            raise InvalidRequest("Give either serialized_named_tensors or shared.", field="serialized_named_tensors")
        if body.shared is not None:
            file = shared_file(self._service.shared, body.shared.path)
            return await self._update(Files({_target(body): [str(file)]}), body)
        return await self._update(self._pickled(body), body)

    def _pickled(self, body: bodies.FromTensor) -> Pickled:
        if not self._service.config.pickle_payloads:
            raise InvalidRequest(
                "This server reads no pickled payloads (--no-pickle-payloads); send safetensors.",
                field="serialized_named_tensors",
            )
        try:
            payloads = [Buffer(base64.b64decode(text, validate=True)) for text in body.serialized_named_tensors or ()]
        except (binascii.Error, ValueError):
            raise InvalidRequest("A payload is no base64.", field="serialized_named_tensors") from None
        targets = body.target_modules or [body.target_module or "transformer"]
        return Pickled(payloads, targets, body.payload_gpu_uuids)

    async def _from_body(self, request: Request) -> dict[str, Any]:
        body = bodies.from_query(request, bodies.FromTensor)
        upload = Upload(self._service.shared)
        try:
            await upload.receive(request)
            return await self._update(Files({_target(body): [str(upload.file)]}), body)
        finally:
            upload.remove()

    async def begin(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.Begin)
        known = self._service.link.ready_model().parameters
        for name in body.target_modules or ():
            if name not in known:
                raise NotFound(f"The model has no module {name!r}; it has {', '.join(known)}.", field="target_modules")
        update_id = uuid.uuid4().hex
        operation = Begin(
            update_id=update_id,
            weight_version=body.weight_version,
            modules=body.target_modules,
            timeout_s=body.timeout_s,
        )
        await self._operate(operation, body.mode)
        return {**_success("The update has begun."), "update_id": update_id}

    async def commit(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.Commit)
        began = time.perf_counter()
        operated = await self._operate(Commit(body.update_id, body.require_complete))
        return _updated(operated, "The update is committed.", began)

    async def abort(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.Abort)
        operated = await self._operate(Abort(body.update_id))
        return {**_success("The update is aborted; every byte is as before."), **self._version(operated)}

    async def init_group(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.InitGroup)
        config = self._service.config
        members = config.replicas * config.tp
        if body.rank_offset + members > body.world_size:
            raise InvalidRequest(
                f"A world of {body.world_size} has no room for the {members} ranks of this server, which begin at "
                f"rank_offset {body.rank_offset}: each rank of each replica is a member, and so is the trainer.",
                field="world_size",
            )
        longest_s = config.stall_timeout_s / 2
        if body.timeout_s is not None and body.timeout_s > longest_s:
            raise InvalidRequest(
                f"timeout_s can be at most {longest_s:g}, half of the server's --stall-timeout-s.", field="timeout_s"
            )
        operation = Join(
            address=body.master_address,
            port=body.master_port,
            rank_offset=body.rank_offset,
            world_size=body.world_size,
            group=body.group_name,
            backend=body.backend,
            timeout_s=body.timeout_s or min(_GROUP_TIMEOUT_S, longest_s),
        )
        operated = await self._operate(operation)
        ranks = sum(report.ranks for report in operated.reports.values())
        return {**_success(f"{ranks} ranks have joined the group."), "ranks": ranks}

    async def from_distributed(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.FromDistributed)
        targets = body.target_modules or ["transformer"]
        if len(targets) != 1:
            raise InvalidRequest("One call is for one module.", field="target_modules")
        source = Broadcast(body.group_name, targets[0], list(body.names), body.dtypes, body.shapes)
        return await self._update(source, body)

    async def destroy_group(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.DestroyGroup)
        operated = await self._operate(Leave(body.group_name))
        if not any(report.left for report in operated.reports.values()):
            raise NotFound(f"There is no group {body.group_name!r}.", field="group_name")
        return _success("The ranks have left the group.")

    async def check(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.Checker)
        expected = body.expected_named_tensors_sha256 or body.expected_transformer_sha256
        if not expected:
            raise InvalidRequest(
                "Give expected_named_tensors_sha256, with at least one tensor.", field="expected_named_tensors_sha256"
            )
        operated = await self._operate(CheckTensors(body.target_module, expected))
        return {**_success(f"All of {len(expected)} tensors match."), "missing": [], "mismatched": [],
                **self._version(operated)}  # fmt: skip

    async def checksum(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.Checksum)
        operated = await self._operate(Digests(body.module_names, body.detail))
        report = _the_same(operated)
        if not body.detail:
            absent = [name for name in body.module_names or () if name not in report.digests]
            return {**report.digests, **dict.fromkeys(absent, "not_found")}
        modules = {
            name: {"sha256": digest, "tensors": msgspec.to_builtins(report.tensors.get(name, {}))}
            for name, digest in report.digests.items()
        }
        return {"modules": modules, "weight_version": report.weight_version}

    async def release(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.Occupation)
        await self._operate(Sleep([*(body.tags or _TAGS)]), "wait")
        return {**_success("The server is asleep."), "sleeping": True}

    async def resume(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.Occupation)
        tags: list[str] = [*(body.tags or _TAGS)]
        await self._operate(Wake(tags))
        sleeping = self._service.link.status.halted == "asleep" and set(tags) != set(_TAGS)
        return {**_success("What was asked for is awake."), "sleeping": sleeping}

    async def pause(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.PauseGeneration)
        await self._send(lambda request_id: Pause(request_id, body.mode))
        return _success("Generation is paused; requests wait.")

    async def go_on(self, request: Request) -> dict[str, Any]:
        await bodies.read(request, bodies.Nothing)
        await self._send(Continue)
        return _success("Generation goes on.")

    async def abort_request(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.AbortRequest)
        if body.all == (body.request_id is not None):
            raise InvalidRequest("Give either request_id or all = true.", field="request_id")
        prefix = None if body.all else f"{body.request_id}."
        await self._send(lambda request_id: AbortRequests(request_id, prefix))
        return _success("What was running under that name is ended.")

    async def flush(self, request: Request) -> dict[str, Any]:
        await bodies.read(request, bodies.Nothing)
        operated = await self._operate(Flush())
        return {**_success("The caches are empty."), "invalidated": _first(operated).invalidated}

    async def _update(
        self, source: Source, body: bodies.FromDisk | bodies.FromTensor | bodies.FromDistributed
    ) -> dict[str, Any]:
        began = time.perf_counter()
        operation = Update(
            source=source,
            weight_version=body.weight_version,
            flush_cache=body.flush_cache,
            update_id=body.update_id,
        )
        operated = await self._operate(operation, body.mode)
        return _updated(operated, "The weights are updated." if body.update_id is None else "Written.", began)

    async def _operate(self, operation: Operation, mode: Barrier = "in_place") -> Operated:
        return await self._send(lambda request_id: Operate(request_id, operation, mode))

    async def _send(self, message: Callable[[str], Operate | Pause | Continue | AbortRequests]) -> Operated:
        request_id = f"{request_id_var.get()}.operation-{next(self._numbers)}"
        with self._service.link.submit(message(request_id)) as events:
            return await events.operated()

    def _version(self, operated: Operated) -> dict[str, Any]:
        model = self._service.link.model()
        return {"weight_version": operated.weight_version or (model.weight_version if model is not None else None)}


def _target(body: bodies.FromTensor) -> str:
    """The one module that a safetensors file is for."""
    targets = body.target_modules or [body.target_module or "transformer"]
    if len(targets) != 1:
        raise InvalidRequest("A safetensors file is for one module.", field="target_modules")
    return targets[0]


def _success(message: str) -> dict[str, Any]:
    return {"success": True, "message": message}


def _first(operated: Operated) -> Report:
    return next(iter(operated.reports.values()), Report())


def _updated(operated: Operated, message: str, began: float) -> dict[str, Any]:
    report = _first(operated)
    return {
        **_success(message),
        "updated": report.updated,
        "applied": sum(report.updated.values()),
        "expected": sum(report.expected.values()),
        "unknown": [],
        "invalid": [],
        "weight_version": report.weight_version or operated.weight_version,
        "ranks": sum(report.ranks for report in operated.reports.values()),
        "elapsed_s": round(time.perf_counter() - began, 6),
        "invalidated": report.invalidated,
    }


def _details_of_failure(report: Report | None) -> dict[str, Any]:
    if report is None:
        return {}
    if report.missing or report.mismatched:
        return {"missing": report.missing, "mismatched": report.mismatched}
    return {
        "applied": 0,
        "expected": sum(report.expected.values()),
        "unknown": report.unknown,
        "invalid": msgspec.to_builtins(report.invalid),
    }


def _the_same(operated: Operated) -> Report:
    """What all replicas say. Raises ``Internal`` that names the one that says something else."""
    first = _first(operated)
    for number, report in operated.reports.items():
        for module, digest in report.digests.items():
            if digest != first.digests.get(module):
                raise Internal(f"Replica {number} has other weights in {module} than replica {min(operated.reports)}.")
    return first
