"""Random models for benchmarks, of the sizes that the questions need."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import Qwen3Config, Qwen3Model

from safelight.tests.tiny import tokenizers


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
    return _written(pipeline, directory)


def save_tiny_z_image(directory: Path) -> Path:
    """A random Z-Image of 2 M parameters beside its word embeddings: near 0.1 s a picture of 128² in 8 steps.

    Other servers recognise the model if ``directory`` is named ``Z-Image-Turbo``.
    """
    if (directory / "model_index.json").exists():
        return directory
    torch.manual_seed(0)
    tokenizer = tokenizers.qwen2_tokenizer()
    encoder = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=256,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=64,
        axes_dims=[32, 48, 48],
        axes_lens=[1024, 512, 512],
    )
    autoencoder = AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        sample_size=64,
        layers_per_block=1,
        shift_factor=0.1,
        scaling_factor=0.36,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    text_encoder = Qwen3Model(encoder)
    return _written(ZImagePipeline(scheduler, autoencoder, text_encoder, tokenizer, transformer), directory)


def _written(pipeline: DiffusionPipeline, directory: Path) -> Path:
    """Save ``pipeline`` under another name first, so that ``directory`` is never there in part."""
    unfinished = directory.with_name(directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    pipeline.save_pretrained(unfinished)
    unfinished.rename(directory)
    return directory
