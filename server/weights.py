"""The post-training routes for weights from files and from tensors, in one call or in several."""

from __future__ import annotations

import base64
import binascii
import functools
import time
import uuid
from typing import Any

from fastapi import APIRouter, Request

from ..protocol.codec import Buffer
from ..protocol.errors import ClientGone, InvalidRequest, NotFound
from ..protocol.operations import Abort, Begin, Commit
from ..protocol.tensor_sources import CudaShared, Files, Pickled, Source
from . import weight_bodies as bodies
from .body_validation import from_query
from .checkpoint_files import SUFFIX, find_files
from .operation_client import OperationClient, success
from .routes import Route, Streamed, routes_of
from .service import Service
from .uploads import Uploads, shared_file
from .weight_writing import UPDATED, WeightWriting, updated

SAFETENSORS = "application/x-safetensors"
_BEGUN_TIMEOUT_S = 300.0


def routes(service: Service) -> APIRouter:
    return routes_of(WeightRoutes(service).table())


class WeightRoutes:
    """The handlers of the routes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._uploads = Uploads(service.shared)
        self._operations = OperationClient(service)
        self._writing = WeightWriting(service, self._operations)

    def table(self) -> list[Route[Any]]:
        return [
            Route(
                path="/update_weights_from_disk", handler=self.from_disk, body=bodies.FromDisk, answer=UPDATED,
                summary="Load safetensors files into the running model",
            ),
            Route(
                path="/update_weights_from_tensor", handler=self.from_tensor, body=bodies.FromTensor, answer=UPDATED,
                summary="Write tensors into the running model", max_values=bodies.TENSORS,
                streamed=Streamed(SAFETENSORS, bodies.FromBody, self.from_body),
            ),
            Route(
                path="/begin_weights_update", handler=self.begin, body=bodies.Begin, answer="`update_id`",
                summary="Begin an update of several parts",
            ),
            Route(
                path="/commit_weights_update", handler=self.commit, body=bodies.Commit, answer=UPDATED,
                summary="End it, so that its weights serve",
            ),
            Route(
                path="/abort_weights_update", handler=self.abort, body=bodies.Abort, answer="`weight_version`",
                summary="End it, with every byte as before",
            ),
        ]  # fmt: skip

    async def from_disk(self, request: Request, body: bodies.FromDisk) -> dict[str, Any]:
        find = functools.partial(find_files, known=self._service.model().parameters)
        source = await self._service.decode(find, body.model_path, body.target_modules, self._service.config)
        whole = body.require_complete
        if whole is None:
            whole = not body.model_path.endswith(SUFFIX)  # a file makes no claim to be all of a module
        return await self._writing.update(request, source, body, require_complete=whole)

    async def from_tensor(self, request: Request, body: bodies.FromTensor) -> dict[str, Any]:
        if (body.shared is None) == (body.serialized_named_tensors is None):
            raise InvalidRequest("Give either serialized_named_tensors or shared.", field="serialized_named_tensors")
        if body.shared is not None:
            source = self._shared(body.shared, _target(body))
        else:
            source = await self._service.decode(self._pickled, body)
            body = body.model_copy(update={"serialized_named_tensors": None})  # it may wait, with one copy in memory
        if body.weight_update_mode == "lora_merge":
            return await self._writing.merge(request, source, _target(body), body)
        return await self._writing.update(request, source, body)

    def _shared(self, shared: bodies.Shared, module: str) -> Source:
        if (shared.path is None) == (shared.cuda_ipc is None):
            raise InvalidRequest("Give either path or cuda_ipc.", field="shared")
        if shared.cuda_ipc is not None:
            return CudaShared(module, [[handle.tensor() for handle in rank] for rank in shared.cuda_ipc])
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

    async def from_body(self, request: Request) -> dict[str, Any]:
        body = from_query(request, bodies.FromBody)
        async with self._uploads.receive(request) as upload:
            source = Files({body.target_module: [str(upload.file)]})
            if body.weight_update_mode == "lora_merge":
                return await self._writing.merge(request, source, body.target_module, body)
            return await self._writing.update(request, source, body)

    async def begin(self, request: Request, body: bodies.Begin) -> dict[str, Any]:
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
            await self._operations.operate(request, operation, body.mode)
        except ClientGone:  # who does not know its id
            self._operations.without_reply(Abort(update_id))
            raise
        self._service.adapter_store.begin_parts(update_id)
        return {**success("The update has begun."), "update_id": update_id}

    async def commit(self, request: Request, body: bodies.Commit) -> dict[str, Any]:
        began = time.perf_counter()
        async with self._service.adapter_store.for_a_change():
            operated = await self._operations.operate(
                request, Commit(body.update_id, body.require_complete, body.weight_version)
            )
            self._service.adapter_store.end_parts(body.update_id)
        return updated(operated, "The update is committed.", began)

    async def abort(self, request: Request, body: bodies.Abort) -> dict[str, Any]:
        if body.any == (body.update_id is not None):
            raise InvalidRequest("Give either update_id or any = true.", field="update_id")
        async with self._service.adapter_store.for_a_change():
            operated = await self._operations.operate(request, Abort(body.update_id))
            if body.update_id is not None:
                self._service.adapter_store.end_parts(body.update_id)
        return {**success("The update is aborted; every byte is as before."), **self._operations.version(operated)}


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
