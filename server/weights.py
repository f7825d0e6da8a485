"""The post-training routes for weights and their digests."""

from __future__ import annotations

import base64
import binascii
import functools
import time
import uuid
from typing import Any

import msgspec
from fastapi import APIRouter, Request

from ..protocol.codec import Buffer
from ..protocol.errors import ClientGone, Internal, InvalidRequest, NotFound, SafelightError
from ..protocol.operations import Abort, Begin, CheckTensors, Commit, Digests, Join, Leave, Update
from ..protocol.reports import Operated, Report
from ..protocol.tensor_sources import Broadcast, CudaShared, Files, Pickled, Source
from . import weight_bodies as bodies
from .adapter_parts import AdapterParts
from .bounded import read_body
from .checkpoint_files import SUFFIX, find_files
from .gate import media_type
from .operating import Handler, Operating, active_adapters, first_report, routes_of, success
from .scheduler_link import OperationFailed
from .service import Service
from .uploads import Uploads, shared_file

SAFETENSORS = "application/x-safetensors"
_GROUP_TIMEOUT_S = 60.0
_BEGUN_TIMEOUT_S = 300.0


def routes(service: Service) -> APIRouter:
    return routes_of(WeightRoutes(service).table())


class WeightRoutes:
    """The handlers of the routes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._uploads = Uploads(service.shared)
        self._operating = Operating(service)
        self._parts = AdapterParts(service, self._operating)

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
            ("/get_weights_checksum", self.checksum, "SHA-256 of the weights that serve"),
        ]

    async def from_disk(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.FromDisk)
        find = functools.partial(find_files, known=self._service.model().parameters)
        source = await self._service.decode(find, body.model_path, body.target_modules, self._service.config)
        whole = body.require_complete
        if whole is None:
            whole = not body.model_path.endswith(SUFFIX)  # a file makes no claim to be all of a module
        return await self._update(request, source, body, require_complete=whole)

    async def from_tensor(self, request: Request) -> dict[str, Any]:
        if media_type(request.headers) == SAFETENSORS:
            return await self._from_body(request)
        body = await bodies.read(request, bodies.FromTensor, bodies.TENSORS)
        if (body.shared is None) == (body.serialized_named_tensors is None):
            raise InvalidRequest("Give either serialized_named_tensors or shared.", field="serialized_named_tensors")
        if body.shared is not None:
            source = self._shared(body.shared, _target(body))
        else:
            source = await self._service.decode(self._pickled, body)
            body = msgspec.structs.replace(body, serialized_named_tensors=None)  # it may wait, with one copy in memory
        if body.weight_update_mode == "lora_merge":
            return await self._merge(request, source, _target(body), body)
        return await self._update(request, source, body)

    def _shared(self, shared: bodies.Shared, module: str) -> Source:
        if (shared.path is None) == (shared.cuda_ipc is None):
            raise InvalidRequest("Give either path or cuda_ipc.", field="shared")
        if shared.cuda_ipc is not None:
            return CudaShared(module, shared.cuda_ipc)
        assert shared.path is not None
        return Files({module: [str(shared_file(self._service.shared, shared.path))]})

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
        return Pickled(payloads, _targets(body), body.payload_gpu_uuids)

    async def _from_body(self, request: Request) -> dict[str, Any]:
        body = bodies.from_query(request, bodies.FromBody)
        async with self._uploads.receive(request) as upload:
            source = Files({body.target_module: [str(upload.file)]})
            if body.weight_update_mode == "lora_merge":
                return await self._merge(request, source, body.target_module, body)
            return await self._update(request, source, body)

    async def begin(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.Begin)
        known = self._service.model().parameters  # also of a replica that waits for weights to be sent again
        for name in body.target_modules or ():
            if name not in known:
                raise NotFound(f"The model has no module {name!r}; it has {', '.join(known)}.", field="target_modules")
        longest_s = self._service.config.max_update_hold_s
        if body.timeout_s is not None and body.timeout_s > longest_s:
            raise InvalidRequest(
                f"timeout_s is {body.timeout_s:g} and can be at most {longest_s:g}, the server's --max-update-hold-s.",
                field="timeout_s",
            )
        update_id = uuid.uuid4().hex
        operation = Begin(
            update_id=update_id,
            weight_version=body.weight_version,
            modules=body.target_modules,
            timeout_s=body.timeout_s or min(_BEGUN_TIMEOUT_S, longest_s),
        )
        try:
            await self._operating.operate(request, operation, body.mode)
        except ClientGone:  # who does not know its id
            self._operating.without_reply(Abort(update_id))
            raise
        self._service.folders.begin_parts(update_id)
        return {**success("The update has begun."), "update_id": update_id}

    async def commit(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.Commit)
        began = time.perf_counter()
        async with self._service.folders.for_a_change():
            operated = await self._operating.operate(
                request, Commit(body.update_id, body.require_complete, body.weight_version)
            )
            self._service.folders.end_parts(body.update_id)
        return _updated(operated, "The update is committed.", began)

    async def abort(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.Abort)
        if body.any == (body.update_id is not None):
            raise InvalidRequest("Give either update_id or any = true.", field="update_id")
        async with self._service.folders.for_a_change():
            operated = await self._operating.operate(request, Abort(body.update_id))
            if body.update_id is not None:
                self._service.folders.end_parts(body.update_id)
        return {**success("The update is aborted; every byte is as before."), **self._operating.version(operated)}

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
        operated = await self._operating.operate(request, operation)
        ranks = sum(report.ranks for report in operated.reports.values())
        told = f"{ranks} ranks have joined the group."
        if body.backend == "nccl":
            told = f"{ranks} ranks have reached the group's store; over NCCL members meet in the first broadcast."
        return {**success(told), "ranks": ranks}

    async def from_distributed(self, request: Request) -> dict[str, Any]:
        """Whoever is refused here may have begun to broadcast: the end of the group tells him, who else would wait."""
        raw = bytearray()
        try:
            raw = await read_body(request)
            body = await bodies.decode(raw, bodies.FromDistributed, bodies.TENSORS)
        except SafelightError:
            self._end_group(bodies.group_of(raw))
            raise
        del raw  # the rest may take long
        try:
            return await self._receive(request, body)
        except ClientGone:
            raise
        except (SafelightError, OperationFailed):
            self._end_group(body.group_name)
            raise

    async def _receive(self, request: Request, body: bodies.FromDistributed) -> dict[str, Any]:
        targets = body.target_modules or ["transformer"]
        if len(targets) != 1:
            raise InvalidRequest("One call is for one module; the group is ended.", field="target_modules")
        source = Broadcast(body.group_name, targets[0], list(body.names), body.dtypes, body.shapes)
        if body.weight_update_mode == "lora_merge":
            return await self._merge(request, source, targets[0], body)
        return await self._update(request, source, body)

    def _end_group(self, name: str | None) -> None:
        """All groups where a body does not tell which it is about."""
        self._operating.without_reply(Leave(name))

    async def destroy_group(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.DestroyGroup)
        operated = await self._operating.operate(request, Leave(body.group_name))
        if not any(report.left for report in operated.reports.values()):
            return success(f"There is no group {body.group_name!r}; nothing was done.")
        return success("The ranks have left the group.")

    async def check(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.Checker, bodies.TENSORS)
        expected = body.digests
        if not expected:
            raise InvalidRequest(
                "Give expected_named_tensors_sha256, with at least one tensor.", field="expected_named_tensors_sha256"
            )
        operated = await self._operating.operate(request, CheckTensors(body.target_module, expected))
        left_out = first_report(operated).left_out
        return {
            **success(f"All of {len(expected) - len(left_out)} tensors match."),
            "missing": [],
            "mismatched": [],
            "left_out": left_out,
            **self._operating.version(operated),
        }

    async def checksum(self, request: Request) -> dict[str, Any]:
        body = await bodies.read(request, bodies.Checksum)
        operated = await self._operating.operate(request, Digests(body.module_names, body.detail))
        report = _the_same(operated)
        if not body.detail:
            absent = [name for name in body.module_names or () if name not in report.digests]
            return {**report.digests, **dict.fromkeys(absent, "not_found")}
        modules = {
            name: {
                "sha256": digest,
                "tensors": msgspec.to_builtins(report.tensors.get(name, {})),
                "aliases": report.aliases.get(name, {}),
                "ignored": report.ignored.get(name, []),
            }
            for name, digest in report.digests.items()
        }
        return {"modules": modules, "weight_version": report.weight_version}

    async def _merge(self, request: Request, source: Source, target: str, body: bodies.LoraBody) -> dict[str, Any]:
        began = time.perf_counter()
        merged = await self._parts.merge(request, source, target, body)
        return {**_updated(merged.operated, merged.message, began), "waiting": merged.waiting}

    async def _update(
        self, request: Request, source: Source, body: bodies.UpdateBody, *, require_complete: bool = False
    ) -> dict[str, Any]:
        began = time.perf_counter()
        operation = Update(
            source=source,
            weight_version=body.weight_version,
            flush_cache=body.flush_cache,
            update_id=body.update_id,
            require_complete=require_complete,
        )
        operated = await self._operating.operate(request, operation, body.mode)
        return _updated(operated, "The weights are updated." if body.update_id is None else "Written.", began)


def _targets(body: bodies.FromTensor) -> list[str]:
    return list(body.target_modules or [body.target_module or "transformer"])


def _target(body: bodies.FromTensor) -> str:
    """The one module that a safetensors file or a part of an adapter is for."""
    targets = _targets(body)
    if len(targets) != 1:
        raise InvalidRequest(
            "A safetensors file, or a part of an adapter, is for one module; send a call for each.",
            field="target_modules",
        )
    return targets[0]


def _updated(operated: Operated, message: str, began: float) -> dict[str, Any]:
    report = first_report(operated)
    return {
        **success(f"{message}{_unable(operated)}"),
        "serving": operated.unable is None and not operated.asleep,
        "updated": report.updated,
        "applied": sum(report.updated.values()),
        "expected": sum(report.expected.values()),
        "unknown": [],
        "left_out": report.left_out,
        "invalid": [],
        "weight_version": report.weight_version or operated.weight_version,
        "ranks": sum(report.ranks for report in operated.reports.values()),
        "elapsed_s": round(time.perf_counter() - began, 6),
        "invalidated": report.invalidated,
        "adapters": active_adapters(operated.adapters),
    }


def _unable(operated: Operated) -> str:
    """What keeps the new weights from serving."""
    if operated.unable is not None:
        return f" The server cannot serve yet: {operated.unable}."
    return " The server is asleep." if operated.asleep else ""


def _the_same(operated: Operated) -> Report:
    """What all replicas say. Raises ``Internal`` that names the one that says something else."""
    first = first_report(operated)
    for number, report in operated.reports.items():
        for module, digest in report.digests.items():
            if digest != first.digests.get(module):
                raise Internal(f"Replica {number} has other weights in {module} than replica {min(operated.reports)}.")
    return first
