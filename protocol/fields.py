"""The table of the fields of a generation request that reach a worker unchanged.

Server, worker, Python client and command line take names, types, ranges, defaults and help from :class:`Settings`, and
those of a rollout from :class:`.rollouts.Rollout`. A field that the server turns into something else (``prompt`` and
``seed`` into samples) is in its ``GenerateBody``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import msgspec

_WEEK_S = 7 * 24 * 3600.0


class Field(msgspec.Struct, frozen=True):
    """The properties of a field besides its type and its default.

    ``high`` may name the option of the server that holds the bound. A field that is an ``argument`` is taken by
    pipelines whose ``__call__`` has one of its name, a ``video`` field by those that make clips, any other by all.
    ``wire`` is its name in a request's body, and ``short`` in the Python client and on the command line; by default
    both are the attribute's.
    """

    help: str
    low: float | None = None
    high: float | str | None = None
    taken_by: Literal["argument", "video"] | None = None
    wire: str | None = None
    short: str | None = None


_argument = functools.partial(Field, taken_by="argument")
_SIDE = _argument("In pixels; a multiple of the model's `size_multiple`", 1, "max_pixels")
_STEPS = _argument("Denoising steps", 1, "max_steps", short="steps")
_TRUE_CFG = _argument("Guidance with a negative prompt, for distilled models", 0, 1000)
_BITWISE = "Run its forwards alone, with diffusers' own defaults: bitwise what diffusers gives for this seed"

_CACHE = (
    "Answer steps that would hardly change anything with the last step's forward: off, balanced, fast, or a threshold; "
    "the server's `--step-cache` when omitted"
)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """``None`` leaves a value to the pipeline's own default."""

    guidance_scale: Annotated[float | None, _argument("How strongly the prompt guides", 0, 1000)] = None
    true_cfg_scale: Annotated[float | None, _TRUE_CFG] = None
    num_inference_steps: Annotated[int | None, _STEPS] = None
    width: Annotated[int | None, _SIDE] = None
    height: Annotated[int | None, _SIDE] = None
    num_frames: Annotated[int | None, _argument("Frames of a video", 1, "max_frames")] = None
    fps: Annotated[int | None, Field("Frames per second of a video", 1, 240, taken_by="video")] = None
    negative_prompt: Annotated[str | None, _argument("What not to show, where the pipeline takes it")] = None
    priority: Annotated[int, Field("Requests of a higher priority run first", -1_000_000, 1_000_000)] = 0
    timeout_s: Annotated[float | None, Field("Seconds after which the request ends with a 504", 0.001, _WEEK_S)] = None
    preview_every: Annotated[int, Field("While streaming, a decoded preview each so many steps", 0, "max_steps")] = 0
    deterministic: Annotated[bool, Field(_BITWISE)] = False
    cache: Annotated[str | float | None, Field(_CACHE, 0, 1)] = None
    extra: Annotated[dict[str, Any], Field("Further arguments of the pipeline; see `arguments` in /model_info")] = {}


class Row(NamedTuple):
    """A field as a row of the table: its ``name`` in a request's body, and the struct's ``attribute``."""

    name: str
    attribute: str
    type: Any
    default: Any
    field: Field

    @property
    def alias(self) -> str:
        """Its name in the Python client and on the command line."""
        return self.field.short or self.attribute


Table = Mapping[str, Row]
"""Rows by the fields' names in a request's body."""


def table_of(struct: type[msgspec.Struct]) -> Table:
    """The fields of ``struct`` that are annotated with a :class:`Field`."""
    found = {}
    for one in msgspec.structs.fields(struct):
        if get_origin(one.type) is Annotated:
            kind, field = get_args(one.type)
            default = one.default if one.default_factory is msgspec.NODEFAULT else one.default_factory()
            name = field.wire or one.name
            found[name] = Row(name, one.name, kind, default, field)
    return found


TABLE = table_of(Settings)

OF_PIPELINES = tuple(row.name for row in TABLE.values() if row.field.taken_by is not None)
"""The fields that not every pipeline takes."""

ARGUMENTS = tuple(row.name for row in TABLE.values() if row.field.taken_by == "argument")
"""The fields that are arguments of pipelines."""
