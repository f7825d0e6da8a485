"""The bodies of the routes for weights."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from pydantic import Field

from ..protocol.errors import InvalidRequest
from ..protocol.operations import Barrier
from ..protocol.tensor_sources import CudaTensor
from .body_types import (
    Address,
    Alpha,
    Digests,
    Encoded,
    Int64,
    Int64s,
    Modules,
    Name,
    Path,
    Rank,
    Seconds,
    TensorNames,
    Texts,
    Version,
)
from .body_validation import Body

TENSORS = 400_000
"""Values of a body that says several things of every tensor of a model."""

DEFAULT_GROUP = "weight_update_group"


class _Update(Body):
    """The fields shared by all routes that write tensors."""

    weight_version: Version | None = Field(
        None, description="Of the weights after it; counted when omitted. Of a begun update, its begin's goes first"
    )
    flush_cache: bool = Field(
        True, description="Without effect: an update forgets what was computed from the weights that it writes"
    )
    mode: Barrier = Field(
        "wait", description="Running requests end first, are aborted, or go on; a part of a begun update has its mode"
    )
    update_id: Name | None = Field(None, description="The begun update that it is a part of")

    def check(self) -> None:
        """Raise ``InvalidRequest`` for a field that the others leave without effect."""


class _LoraUpdate(_Update):
    weight_update_mode: Literal["lora_merge"] | None = Field(None, description="The tensors are an adapter's factors")
    lora_alpha: Alpha | None = None
    lora_rank: Rank | None = None
    lora_complete: bool = Field(False, description="No more parts of the adapter come: layers without one go")

    def check(self) -> None:
        if self.weight_update_mode is None:
            for name, value in (("alpha", self.lora_alpha), ("rank", self.lora_rank), ("complete", self.lora_complete)):
                _without_effect(f"lora_{name}", value, "describes an adapter; give weight_update_mode = lora_merge too")


class FromDisk(
    _Update, json_schema_extra={"example": {"model_path": "/checkpoints/step-100", "weight_version": "100"}}
):
    model_path: Path = Field(description="A pipeline's directory, a component's, or a safetensors file")
    load_format: None = None
    target_modules: Modules | None = Field(None, description="Every module that the directory has, when omitted")
    require_complete: bool | None = Field(None, description="Whether every tensor has to be there; for directories")


class CudaHandle(Body):
    """A tensor on a GPU, as torch shares it."""

    name: str
    dtype: str
    shape: Int64s
    stride: Int64s
    offset: Int64
    device: str
    memory: Encoded
    storage_bytes: Int64
    storage_offset: Int64
    counters: Encoded
    counter: Int64
    event: Encoded
    event_sync: bool

    def tensor(self) -> CudaTensor:
        return CudaTensor(**dict(self))


Handles = Annotated[list[CudaHandle], Field(fail_fast=True)]


class Shared(Body):
    """Either a safetensors file in the server's shared-memory directory, which stays the sender's to remove, or
    handles as torch makes them: a list for each rank of each replica."""

    path: Path | None = None
    cuda_ipc: Annotated[list[Handles], Field(fail_fast=True)] | None = None


class FromTensor(
    _LoraUpdate,
    json_schema_extra={
        "example": {"shared": {"path": "/dev/shm/safelight-1/step-100.safetensors"}, "target_module": "transformer"}
    },
):
    """Either ``serialized_named_tensors`` or ``shared``."""

    serialized_named_tensors: Texts | None = Field(None, description="`ForkingPickler` streams in base64")
    load_format: Literal["flattened_bucket"] | None = None
    shared: Shared | None = None
    target_modules: Modules | None = None
    target_module: Name | None = Field(None, description="`transformer` when omitted")
    payload_gpu_uuids: Texts | None = Field(None, description="The GPU that each stream is for")

    def check(self) -> None:
        super().check()
        if self.shared is not None:
            streams = "describes serialized_named_tensors, not shared"
            _without_effect("payload_gpu_uuids", self.payload_gpu_uuids, streams)
            _without_effect("load_format", self.load_format, streams)
        if self.target_modules is not None and self.target_module not in (None, *self.target_modules):
            _without_effect("target_module", self.target_module, "is none of target_modules; give one of the two")


class FromBody(_LoraUpdate):
    """The query of a call with a safetensors body."""

    target_module: Name = "transformer"


class FromDistributed(
    _LoraUpdate,
    json_schema_extra={"example": {"names": ["proj_out.weight"], "dtypes": ["bfloat16"], "shapes": [[64, 256]]}},
):
    names: TensorNames
    dtypes: Texts
    shapes: Annotated[list[Int64s], Field(fail_fast=True)]
    group_name: Name = DEFAULT_GROUP
    target_modules: Modules | None = Field(None, description="One module; `transformer` when omitted")
    load_format: None = None


def _without_effect(field: str, value: object, why: str) -> None:
    if value:
        raise InvalidRequest(f"{field} {why}.", field=field)


UpdateBody = FromDisk | FromTensor | FromBody | FromDistributed
LoraBody = FromTensor | FromBody | FromDistributed


class Begin(Body, json_schema_extra={"example": {"weight_version": "100", "target_modules": ["transformer"]}}):
    weight_version: Version | None = None
    target_modules: Modules | None = None
    mode: Barrier = "wait"
    timeout_s: Seconds | None = Field(None, description="Without a part or its end for so long, it is aborted")


class Commit(Body, json_schema_extra={"example": {"update_id": "0f8fad5bd9cb469fa165"}}):
    update_id: Name
    require_complete: bool = Field(False, description="Refuse unless every tensor of the modules has come")
    weight_version: Version | None = None


class Abort(Body, json_schema_extra={"example": {"update_id": "0f8fad5bd9cb469fa165"}}):
    """Either ``update_id``, or ``any`` for whichever update is begun."""

    update_id: Name | None = None
    any: bool = False


class InitGroup(
    Body,
    json_schema_extra={
        "example": {"master_address": "10.0.0.1", "master_port": 29500, "rank_offset": 1, "world_size": 2}
    },
):
    master_address: Address
    master_port: Annotated[int, Field(ge=1, le=65535)]
    rank_offset: Annotated[int, Field(ge=1, le=1_000_000)] = Field(description="The rank of the server's first rank")
    world_size: Annotated[int, Field(ge=2, le=1_000_000)] = Field(description="Ranks of trainer and server together")
    group_name: Name = DEFAULT_GROUP
    backend: Literal["gloo", "nccl"] = "nccl"
    timeout_s: Seconds | None = None


class DestroyGroup(Body, json_schema_extra={"example": {"group_name": DEFAULT_GROUP}}):
    group_name: Name = DEFAULT_GROUP


class Checker(Body, json_schema_extra={"example": {"expected_named_tensors_sha256": {"proj_out.weight": "9f86d081"}}}):
    target_module: Name = "transformer"
    expected_named_tensors_sha256: Digests | None = None
    expected_transformer_sha256: Digests | list[Digests] | None = Field(
        None, description="What older clients send; a list has one for each rank"
    )

    @property
    def digests(self) -> dict[str, str]:
        """The union of all maps. Raises ``InvalidRequest`` if two maps differ, or are of two modules."""
        older = self.expected_transformer_sha256 or []
        if older and self.target_module != "transformer":
            raise InvalidRequest(
                "expected_transformer_sha256 is of the transformer; for others, give expected_named_tensors_sha256.",
                field="expected_transformer_sha256",
            )
        maps = [self.expected_named_tensors_sha256 or {}, *(older if isinstance(older, list) else [older])]
        found: dict[str, str] = {}
        for name, digest in (pair for one in maps for pair in one.items()):
            if found.setdefault(name, digest).lower() != digest.lower():
                raise InvalidRequest(
                    f"{name[:100]!r} is expected to have two digests; the full tensor has one on every rank.",
                    field="expected_transformer_sha256",
                )
        return found


class Checksum(Body, json_schema_extra={"example": {"module_names": ["transformer"], "detail": True}}):
    module_names: list[Name] | None = None
    detail: bool = Field(False, description="Of every tensor, too")


class _OfGroup(msgspec.Struct, frozen=True):
    group_name: str | None = DEFAULT_GROUP


def group_of(body: bytearray) -> str | None:
    """The group that a body is about which may be wrong otherwise; ``None`` where it does not tell."""
    try:
        return msgspec.json.decode(body, type=_OfGroup).group_name or DEFAULT_GROUP
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
