"""Upper bounds for arguments that determine how much a pipeline computes, chosen by the argument's name.

Diffusers does not mark such arguments otherwise, and without a bound one request could take all memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import msgspec

from ...protocol.config import Config
from ...protocol.replicas import Parameter

_LONGEST_TEXT = 4096
"""The limit in tokens if neither the pipeline has a default nor a tokenizer a limit."""

_CHECKED_AS_FIELDS = frozenset({"width", "height"})


def bounded(arguments: Mapping[str, Parameter], config: Config, longest_text: int | None) -> dict[str, Parameter]:
    """``arguments`` with maxima where a larger value costs time and memory.

    ``longest_text`` is the largest length that a tokenizer of the model supports, in tokens.
    """
    limits = [(re.compile(pattern), limit) for pattern, limit in _limits(config).items()]
    bounded = dict(arguments)
    for name, parameter in arguments.items():
        if name == "max_sequence_length":
            limit: int | None = max(parameter.default or 0, longest_text or 0) or _LONGEST_TEXT
        elif name in _CHECKED_AS_FIELDS or not ("int" in parameter.types or name.endswith("_list")):
            continue  # most lists of numbers condition the model (SDXL's ``original_size``) and cost nothing
        else:
            limit = next((limit for pattern, limit in limits if pattern.search(name)), None)
        bounded[name] = msgspec.structs.replace(parameter, maximum=limit)
    return bounded


def _limits(config: Config) -> dict[str, int]:
    """Limits by name pattern; the first matching pattern applies."""
    return {
        r"(^|_)steps(_list)?$": config.max_steps,
        r"(^|_)frames|video_length$|frame_length$": config.max_frames,
        r"area$": config.max_pixels,
        r"(tokens|length)$": _LONGEST_TEXT,
        r"resolution$|_height$|_width$|_size$": math.isqrt(config.max_pixels),
        r"^layers$|_reps$|_n_sample$|^parallel$|_per_image$": config.max_outputs,
    }
