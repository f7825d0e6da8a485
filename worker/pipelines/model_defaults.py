"""Model defaults: the defaults that a checkpoint declares for requests, in its ``safelight.json``.

::

    {"defaults": {"width": 64, "height": 64, "num_frames": 17}, "fps": 8}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from diffusers import DiffusionPipeline
from msgspec import Meta

from ...protocol.errors import StartFailed
from .arguments import call_arguments

FILE = "safelight.json"


class ModelDefaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``defaults`` are arguments of the pipeline's ``__call__``, ``fps`` is the frame rate of its clips."""

    defaults: dict[str, Any] = {}
    fps: Annotated[int, Meta(ge=1, le=240)] | None = None


def read_model_defaults(directory: Path, pipeline: type[DiffusionPipeline]) -> ModelDefaults:
    """Read the defaults in ``directory``; empty if it has no file.

    Raises ``StartFailed`` for an invalid file, because nobody would notice a default that has no effect.
    """
    file = directory / FILE
    if not file.is_file():
        return ModelDefaults()
    try:
        found = msgspec.json.decode(file.read_bytes(), type=ModelDefaults)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StartFailed(f"{file} cannot be read: {error}.") from None
    known = call_arguments(pipeline)
    for name, value in found.defaults.items():
        if name not in known or not _fits(value, known[name].types):
            raise StartFailed(f"{file} has the default {name} = {value!r}, which {pipeline.__name__} does not take.")
    return found


def _fits(value: Any, types: list[str]) -> bool:
    """True if ``value`` has one of the JSON ``types``; a number must be positive."""
    kind = type(value).__name__
    of_type = kind in types or (kind == "int" and "float" in types)
    return of_type and (kind not in ("int", "float") or value > 0)
