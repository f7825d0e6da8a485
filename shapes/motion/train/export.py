"""Stage four: the trained parts as a `WanPipeline` checkpoint, as any Wan checkpoint is laid out."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, ModelMixin, WanPipeline

from ..clip import FPS, FRAMES, SIDE
from .latents import Latents
from .model import TextToVelocity
from .text import TEXT_TOKENS, tokenizer

DEFAULTS: dict[str, Any] = {
    "defaults": {"width": SIDE, "height": SIDE, "num_frames": FRAMES, "max_sequence_length": TEXT_TOKENS},
    "fps": FPS,
}
"""Defaults of requests, which runtimes read from `safelight.json`: `WanPipeline`'s own defaults are larger."""


def pipeline(vae: AutoencoderKLWan, model: TextToVelocity, latents: Latents) -> WanPipeline:
    """The parts as a pipeline, sharing their weights. Half of the scheduler's steps lie above 0.75, for the layout."""
    vae.register_to_config(latents_mean=latents.mean.tolist(), latents_std=latents.deviation.tolist())
    built = WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=model.umt5.eval(),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=model.transformer.eval(),
    )
    built.set_progress_bar_config(disable=True)
    return built


def export(vae: AutoencoderKLWan, model: TextToVelocity, latents: Latents, folder: Path, dtype: torch.dtype) -> None:
    """Writes the checkpoint, transformer and autoencoder in `dtype`; the parts given stay as they are.

    The text encoder stays in float32: transformers keeps the file's dtype, diffusers loads float32 by default,
    and a pipeline loaded without a dtype would mix the two.
    """
    built = pipeline(copy.deepcopy(vae), copy.deepcopy(model), latents)
    for part in (built.vae, built.transformer):
        _narrow(part, dtype)
    built.save_pretrained(folder, safe_serialization=True)
    (folder / "safelight.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


def _narrow(part: ModelMixin, dtype: torch.dtype) -> None:
    """Casts the parameters to `dtype`, all but those that diffusers would hold in float32 whatever it is asked for."""
    wide = set(part._keep_in_fp32_modules or ())
    for name, parameter in part.named_parameters():
        if wide.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
