"""The frame rate for which a pipeline's clips are made, as far as diffusers documents it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video

from ...protocol.replicas import Parameter

ARGUMENTS = ("frame_rate", "fps", "target_fps")
"""Names of the frame rate among pipelines' arguments."""

_DEFAULT = 16
"""The frame rate of pipelines that document none."""

_MAX = 240

_EXAMPLE = re.compile(r"^\s*(?:>>>|\.\.\.).*\bfps\s*=\s*(\d+)", re.MULTILINE)
_EXPORT = re.compile(r"\bexport_to_(?:video|gif)\(")


def rate_argument(arguments: Mapping[str, Any]) -> int | None:
    """The frames per second that ``arguments`` pass to the pipeline, if any."""
    rate = next((value for name in ARGUMENTS if (value := arguments.get(name))), None)
    return None if rate is None else min(max(1, round(rate)), _MAX)


def frame_rate(
    pipeline: type[DiffusionPipeline], arguments: Mapping[str, Parameter], defaults: Mapping[str, Any]
) -> int:
    """Frames per second: the default of the pipeline's argument, or the rate in its docstring's example.

    ``defaults`` take precedence over the pipeline's own. CogVideoX's example exports its clip with ``fps=8``.
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
    return _DEFAULT
