"""Stage four: the trained parts as a `FluxPipeline` checkpoint, as any FLUX checkpoint is laid out."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

from ..scene import PICTURE
from .latents import Latents
from .model import TextToVelocity
from .text import TEXT_TOKENS, clip_tokenizer, t5_tokenizer

DEFAULTS: dict[str, Any] = {"defaults": {"width": PICTURE, "height": PICTURE, "max_sequence_length": TEXT_TOKENS}}
"""Defaults of requests, which runtimes read from `safelight.json`: `FluxPipeline`'s own defaults are larger."""


def pipeline(vae: AutoencoderKL, model: TextToVelocity, latents: Latents) -> FluxPipeline:
    """The parts as a pipeline, sharing their weights. Half of the scheduler's steps lie above 0.75, for the layout."""
    vae.register_to_config(shift_factor=latents.shift, scaling_factor=latents.scale)
    built = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=model.clip.eval(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=model.t5.eval(),
        tokenizer_2=t5_tokenizer(),
        transformer=model.transformer.eval(),
    )
    built.set_progress_bar_config(disable=True)
    return built


def export(vae: AutoencoderKL, model: TextToVelocity, latents: Latents, folder: Path, dtype: torch.dtype) -> None:
    """Writes the checkpoint, transformer and autoencoder in `dtype`; the parts given stay as they are.

    The text encoders stay in float32: transformers keeps the file's dtype, diffusers loads float32 by default,
    and a pipeline loaded without a dtype would mix the two.
    """
    built = pipeline(copy.deepcopy(vae).to(dtype), copy.deepcopy(model), latents)
    built.transformer.to(dtype)
    built.save_pretrained(folder, safe_serialization=True)
    (folder / "safelight.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
