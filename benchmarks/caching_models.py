"""Random models for the benchmark of caching, made from the embedded ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, WanTransformer3DModel
from transformers import T5Config, T5EncoderModel


def save_guided_clips(shapes_video: Path, directory: Path, *, layers: int, heads: int) -> Path:
    """The embedded video model with a random transformer, whose heads are 32 wide."""

    def change(pipeline: Any) -> None:
        form = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": 32, "ffn_dim": 128 * heads}
        pipeline.transformer = WanTransformer3DModel(**_config(pipeline.transformer) | form)

    return _save(shapes_video, directory, change)


def save_long_text(shapes: Path, directory: Path) -> Path:
    """The embedded model with a random T5 encoder of 50 M parameters."""

    def change(pipeline: Any) -> None:
        config = pipeline.text_encoder_2.config.to_dict()
        form = {"d_model": 512, "d_ff": 2048, "num_layers": 12, "num_heads": 8, "d_kv": 64}
        pipeline.text_encoder_2 = T5EncoderModel(T5Config(**config | form)).eval()
        pipeline.transformer = FluxTransformer2DModel(**_config(pipeline.transformer) | {"joint_attention_dim": 512})

    return _save(shapes, directory, change)


def _config(module: Any) -> dict[str, Any]:
    return {name: value for name, value in module.config.items() if not name.startswith("_")}


def _save(source: Path, directory: Path, change: Callable[[Any], None]) -> Path:
    """Save the pipeline in ``source``, changed, as ``directory``, unless it is there."""
    if not directory.exists():
        pipeline = DiffusionPipeline.from_pretrained(source)
        torch.manual_seed(0)
        change(pipeline)
        pipeline.save_pretrained(directory)
        shutil.copy(source / "safelight.json", directory / "safelight.json")
    return directory
