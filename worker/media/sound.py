"""The sound of a clip, if its pipeline makes one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, DiffusionPipeline
from diffusers.utils import BaseOutput

_RATES = (("vocoder", "output_sampling_rate"), ("audio_vae", "sample_rate"))
"""Components and their configuration entries for the sample rate, in order of precedence."""


@dataclass(frozen=True, slots=True)
class Sound:
    """``samples`` are [channels, samples] in [-1, 1], ``rate`` per second."""

    samples: torch.Tensor
    rate: int


def first_sound(pipeline: DiffusionPipeline, output: BaseOutput) -> Sound | None:
    """The sound of the first clip; ``None`` if there is none or its rate is unknown."""
    found = output.get("audio")
    rate = None if found is None else _rate(pipeline)
    if found is None or rate is None:
        return None
    samples = torch.as_tensor(found[0]).detach().float()
    return Sound(samples.reshape(-1, samples.shape[-1]), rate)


def _rate(pipeline: DiffusionPipeline) -> int | None:
    for name, entry in _RATES:
        component = pipeline.components.get(name)
        if isinstance(component, ConfigMixin) and isinstance(rate := component.config.get(entry), int):
            return rate
    return None
