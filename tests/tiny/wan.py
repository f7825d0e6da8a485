"""Wan 2.1, and 2.2 with its two transformers."""

from typing import Any

from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from . import text_encoders, tokenizers
from .family import Family
from .weights import ready, seeded


def _transformer(in_channels: int = 4) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )


def _autoencoder() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0, 0.1, -0.1, 0.2],
        latents_std=[1.0, 1.1, 0.9, 1.2],
    )


def _components() -> dict[str, Any]:
    tokenizer = tokenizers.t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoders.umt5(tokenizer),
        "vae": _autoencoder(),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        "transformer": _transformer(),
    }


def build_wan() -> WanPipeline:
    """Wan 2.1 text-to-video with one transformer and the UniPC flow scheduler."""
    with seeded():
        return ready(WanPipeline(**_components()))


def build_wan_from_image() -> WanImageToVideoPipeline:
    """Wan 2.2 image-to-video: the image's latents and a mask of as many channels come in beside the noise."""
    with seeded():
        return ready(WanImageToVideoPipeline(**_components() | {"transformer": _transformer(in_channels=12)}))


def build_wan22() -> WanPipeline:
    """Wan 2.2: one transformer for the noisy steps, another one below nine tenths of the noise."""
    with seeded():
        return ready(WanPipeline(**_components(), transformer_2=_transformer(), boundary_ratio=0.9))


_CALL: dict[str, Any] = {
    "width": 32,
    "height": 32,
    "num_frames": 5,
    "num_inference_steps": 3,
    "guidance_scale": 5.0,
    "max_sequence_length": 64,
}

WAN = Family(
    name="wan",
    build=build_wan,
    call=_CALL,
    kind="video",
    note="guidance as two calls in a row; a multistep scheduler with history; the VAE keeps a feature cache in a call",
)

WAN22 = Family(
    name="wan22",
    build=build_wan22,
    call=_CALL,
    kind="video",
    note="two transformers, each for its part of the steps",
)
