"""The largest values of the arguments that say how much a pipeline computes, by what their names say that they count.

Diffusers has no other mark for them, and a pipeline computes whatever it is told to: one request could take all memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import msgspec

from ..protocol.config import Config
from ..protocol.replicas import Parameter

_LONGEST_TEXT = 4096
"""Tokens, for pipelines that name no default and tokenizers that name no limit."""

_CHECKED_AS_FIELDS = frozenset({"width", "height"})


def bounded(arguments: Mapping[str, Parameter], config: Config, longest_text: int | None) -> dict[str, Parameter]:
    """``arguments`` with a maximum where a larger value would only cost time and memory.

    ``longest_text`` is what the model's tokenizers are made for, in tokens.
    """
    limits = [(re.compile(pattern), limit) for pattern, limit in _limits(config).items()]
    bounded = dict(arguments)
    for name, parameter in arguments.items():
        if name == "max_sequence_length":
            limit: int | None = max(parameter.default or 0, longest_text or 0) or _LONGEST_TEXT
        elif name in _CHECKED_AS_FIELDS or not ("int" in parameter.types or name.endswith("_list")):
            continue  # a list of numbers is mostly something that the model is told (SDXL's ``original_size``)
        else:
            limit = next((limit for pattern, limit in limits if pattern.search(name)), None)
        bounded[name] = msgspec.structs.replace(parameter, maximum=limit)
    return bounded


def _limits(config: Config) -> dict[str, int]:
    """By patterns of names, of which the first that matches counts."""
    return {
        r"(^|_)steps(_list)?$": config.max_steps,
        r"(^|_)frames|video_length$|frame_length$": config.max_frames,
        r"area$": config.max_pixels,
        r"(tokens|length)$": _LONGEST_TEXT,
        r"resolution$|_height$|_width$|_size$": math.isqrt(config.max_pixels),
        r"^layers$|_reps$|_n_sample$|^parallel$|_per_image$": config.max_outputs,
    }
