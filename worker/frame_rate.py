"""How many frames a second a pipeline's clips are made for: diffusers says so itself, in one place or another."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video

from ..protocol.replicas import Parameter

ARGUMENTS = ("frame_rate", "fps", "target_fps")
"""What pipelines that are told the rate call it."""

_OTHERWISE = 16
"""For pipelines that say nothing of it."""

_FASTEST = 240
"""At which a request may have its clip play."""

_EXAMPLE = re.compile(r"^\s*(?:>>>|\.\.\.).*\bfps\s*=\s*(\d+)", re.MULTILINE)
_EXPORT = re.compile(r"\bexport_to_(?:video|gif)\(")


def rate_argument(arguments: Mapping[str, Any]) -> int | None:
    """Frames a second that a pipeline is told by ``arguments``, where they say it."""
    told = next((value for name in ARGUMENTS if (value := arguments.get(name))), None)
    return None if told is None else min(max(1, round(told)), _FASTEST)


def frame_rate(
    pipeline: type[DiffusionPipeline], arguments: Mapping[str, Parameter], defaults: Mapping[str, Any]
) -> int:
    """Frames a second: of the argument that the pipeline is told it by, or of the example in its documentation.

    ``defaults`` go before the pipeline's own. CogVideoX' example exports its clip with ``fps=8``, Wan's with 16.
    """
    usual = {name: parameter.default for name, parameter in arguments.items()}
    if (rate := rate_argument(defaults)) or (rate := rate_argument(usual)):
        return rate
    documentation = pipeline.__call__.__doc__ or ""
    if example := _EXAMPLE.search(documentation):
        return int(example[1])
    if _EXPORT.search(documentation):
        default: int = inspect.signature(export_to_video).parameters["fps"].default
        return default
    return _OTHERWISE
