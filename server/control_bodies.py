"""The bodies and queries of the post-training routes that are not about tensors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..protocol.operations import Barrier
from .body_types import Modules, Name, TensorNames, Version
from .body_validation import Body


class Nothing(Body, json_schema_extra={"example": {}}):
    """No fields."""


class Occupation(Body, json_schema_extra={"example": {"tags": ["weights"]}}):
    """Everything that is offloaded is kept, whether ``cpu_backup_tags`` name it or not."""

    tags: list[Name] | None = Field(None, description="`weights`, `caches`, or names of modules; all when omitted")
    cpu_backup_tags: list[Name] | None = Field(None, description="Accepted, and without effect")


class PauseGeneration(Body, json_schema_extra={"example": {"mode": "wait"}}):
    """To ``retract`` is what other servers call it when requests stop where they are and go on later."""

    mode: Barrier | Literal["retract"] = "wait"

    @property
    def barrier(self) -> Barrier:
        return "in_place" if self.mode == "retract" else self.mode


class AbortRequest(Body, json_schema_extra={"example": {"all": True}}):
    """Either a request's id or ``all``."""

    request_id: Name | None = None
    all: bool | None = None
    rid: str | None = Field(None, description="The same as `request_id`")
    abort_all: bool | None = Field(None, description="The same as `all`")

    @property
    def every(self) -> bool:
        return bool(self.all or self.abort_all)

    @property
    def names(self) -> list[str]:
        """The requests that it names: one, unless it contradicts itself."""
        return list({name for name in (self.request_id, self.rid) if name})


class WeightVersion(Body, json_schema_extra={"example": {"new_version": "100"}}):
    new_version: Version
    abort_all_requests: bool = False


class WeightsChecker(Body, json_schema_extra={"example": {"action": "snapshot"}}):
    action: Literal["snapshot", "compare", "reset_tensors"]
    target_modules: Modules | None = Field(None, description="What to reset; `transformer` when omitted")
    skip_tensor_list: Annotated[TensorNames, Field(max_length=256)] | None = Field(
        None, description="Tensors whose names contain one of these are neither reset nor compared"
    )
    selector: Literal["all", "target"] | None = Field(None, description="Without effect: there is one model")
    allow_quant_error: bool | None = Field(None, description="Without effect: no weights are quantized")

    def skips(self, name: str) -> bool:
        return any(part in name for part in self.skip_tensor_list or ())


class PostProcess(Body, json_schema_extra={"example": {"post_load_weights": True}}):
    restore_weights_before_load: bool | None = None
    post_process_quantization: bool | None = None
    post_load_weights: bool | None = None
