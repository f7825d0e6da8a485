"""Random models for benchmarks, of the sizes that the questions need."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel


def save_mid_size(shapes: Path, directory: Path) -> Path:
    """The embedded model with a random transformer of 42 M parameters: near 1 s a picture on two CPU cores.

    ``shapes`` is the embedded model's directory; the result is written to ``directory`` once and used again.
    """
    if (directory / "model_index.json").exists():
        return directory
    pipeline = DiffusionPipeline.from_pretrained(shapes)
    small = pipeline.transformer.config
    torch.manual_seed(0)
    pipeline.transformer = FluxTransformer2DModel(
        in_channels=small.in_channels,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=12,
        joint_attention_dim=small.joint_attention_dim,
        pooled_projection_dim=small.pooled_projection_dim,
        axes_dims_rope=(16, 24, 24),
        guidance_embeds=False,
    )
    unfinished = directory.with_name(directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    pipeline.save_pretrained(unfinished)
    unfinished.rename(directory)
    return directory
