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
    return _save(shapes, directory, layers=1, single_layers=2, heads=12)


def save_large(shapes: Path, directory: Path) -> Path:
    """The embedded model with a random transformer of 1.3 GB in float32, in the same way."""
    return _save(shapes, directory, layers=2, single_layers=4, heads=24)


def _save(shapes: Path, directory: Path, *, layers: int, single_layers: int, heads: int) -> Path:
    if (directory / "model_index.json").exists():
        return directory
    pipeline = DiffusionPipeline.from_pretrained(shapes)
    small = pipeline.transformer.config
    torch.manual_seed(0)
    pipeline.transformer = FluxTransformer2DModel(
        in_channels=small.in_channels,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=64,
        num_attention_heads=heads,
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
