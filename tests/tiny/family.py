"""A tiny family: a small random model of a pipeline class."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Family:
    """A pipeline class in a tiny random-weight form.

    Attributes:
        name: the key in `FAMILIES`.
        build: makes the pipeline, with the same weights each time.
        call: keyword arguments of a quick call, without `prompt`, `generator` and `output_type`.
        kind: whether the result has `.images` or `.frames`.
        note: what is particular about it at the boundary.
    """

    name: str
    build: Callable[[], DiffusionPipeline]
    call: dict[str, Any]
    kind: Literal["image", "video"]
    note: str
