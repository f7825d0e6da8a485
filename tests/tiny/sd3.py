"""Stable Diffusion 3."""

from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
)

from . import text_encoders, tokenizers
from .autoencoders import image_autoencoder
from .family import Family
from .weights import ready, seeded


def _transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def _components() -> dict[str, Any]:
    """All three text encoders: two CLIPs of width 32 side by side, T5 of width 64."""
    first, second = tokenizers.clip_tokenizer(), tokenizers.clip_tokenizer(pad_token="!")
    third = tokenizers.t5_tokenizer()
    return {
        "transformer": _transformer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": image_autoencoder(latent_channels=4, shift_factor=0.1),
        "text_encoder": text_encoders.projected_clip(first),
        "tokenizer": first,
        "text_encoder_2": text_encoders.projected_clip(second),
        "tokenizer_2": second,
        "text_encoder_3": text_encoders.t5(third, width=64),
        "tokenizer_3": third,
    }


def build_sd3() -> StableDiffusion3Pipeline:
    """SD3.5."""
    with seeded():
        return ready(StableDiffusion3Pipeline(**_components()))


def build_sd3_pag() -> StableDiffusion3PAGPipeline:
    """SD3.5 with perturbed-attention guidance in the second block."""
    with seeded():
        return ready(StableDiffusion3PAGPipeline(**_components(), pag_applied_layers=["blocks.1"]))


_CALL: dict[str, Any] = {
    "width": 64,
    "height": 64,
    "num_inference_steps": 3,
    "guidance_scale": 5.0,
    "max_sequence_length": 64,
}

SD3 = Family(
    name="sd3",
    build=build_sd3,
    call=_CALL,
    kind="image",
    note="guidance as one call with 2 B rows; three text encoders",
)

SD3_PAG = Family(
    name="sd3_pag",
    build=build_sd3_pag,
    call=_CALL | {"pag_scale": 3.0},
    kind="image",
    note="troublesome: swaps attention processors on the shared transformer during a call; 3 B rows",
)
