"""What a checkpoint says of itself in ``safelight.json``: what a request gets when it leaves something out.

::

    {"defaults": {"width": 64, "height": 64, "num_frames": 17}, "fps": 8}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from diffusers import DiffusionPipeline
from msgspec import Meta

from ..protocol.errors import StartFailed
from .arguments import call_arguments

FILE = "safelight.json"


class ModelDefaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``defaults`` are arguments of the pipeline's ``__call__``; ``fps`` is the frame rate of its clips."""

    defaults: dict[str, Any] = {}
    fps: Annotated[int, Meta(ge=1, le=240)] | None = None


def read_model_defaults(directory: Path, pipeline: type[DiffusionPipeline]) -> ModelDefaults:
    """What ``directory`` has of it, nothing where there is no such file.

    Raises ``StartFailed`` for a file that is wrong: a default that is not passed on would be missed by nobody.
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
    """Whether it is of one of the JSON ``types``, and as a number above zero."""
    kind = type(value).__name__
    of_type = kind in types or (kind == "int" and "float" in types)
    return of_type and (kind not in ("int", "float") or value > 0)
