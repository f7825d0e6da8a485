"""FLUX.2 klein, plain and with a key-value cache for reference images."""

from typing import Any

from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from PIL import Image

from . import language_models, tokenizers
from .family import Family
from .weights import ready, seeded


def _transformer() -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=3 * language_models.WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )


def _autoencoder() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        mid_block_add_attention=False,
    )


def _components() -> dict[str, Any]:
    tokenizer = tokenizers.qwen2_tokenizer()
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": _autoencoder(),
        "text_encoder": language_models.deep_qwen3(tokenizer),
        "tokenizer": tokenizer,
        "transformer": _transformer(),
    }


def build_flux2() -> Flux2KleinPipeline:
    """FLUX.2 klein, not distilled: with guidance."""
    with seeded():
        return ready(Flux2KleinPipeline(**_components()))


def build_flux2_kv() -> Flux2KleinKVPipeline:
    """FLUX.2 klein, distilled, with a cache of the reference image's keys and values."""
    with seeded():
        return ready(Flux2KleinKVPipeline(**_components()))


FLUX2 = Family(
    name="flux2",
    build=build_flux2,
    call={"width": 64, "height": 64, "num_inference_steps": 3, "guidance_scale": 4.0, "max_sequence_length": 64},
    kind="image",
    note="guidance as two calls in a row; img_ids and txt_ids with a batch dimension",
)

FLUX2_KV = Family(
    name="flux2_kv",
    build=build_flux2_kv,
    call={
        "image": Image.linear_gradient("L").resize((64, 64)).convert("RGB"),
        "width": 64,
        "height": 64,
        "num_inference_steps": 3,
        "max_sequence_length": 64,
    },
    kind="image",
    note="troublesome: a mutable cache object is returned by the first call and an argument of the others",
)
