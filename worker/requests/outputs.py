"""The pictures and clips in what a pipeline returns."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput

from .failure import NothingMade


def first_output(output: BaseOutput) -> torch.Tensor:
    """The first picture [C, H, W] or clip [F, C, H, W] of a pipeline's output, float in [0, 1].

    Raises ``NothingMade`` if there is none, as for a strength so low that no step is left.
    """
    every = outputs(output)
    if not every:
        raise NothingMade
    return every[0]


def outputs(output: BaseOutput) -> list[torch.Tensor]:
    """Every picture or clip of a pipeline's output, in the form of :func:`first_output`."""
    found = next(output[name] for name in ("images", "frames", "image") if name in output)
    return [_in_channels_first(one) for one in found]


def _in_channels_first(found: Any) -> torch.Tensor:
    if isinstance(found, torch.Tensor):
        return found
    array = torch.from_numpy(np.ascontiguousarray(found)).movedim(-1, -3)
    return array if array.is_floating_point() else array / 255
