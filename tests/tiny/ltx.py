"""LTX-Video."""

from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)

from . import text_encoders, tokenizers
from .family import Family
from .weights import ready, seeded


def _transformer() -> LTXVideoTransformer3DModel:
    return LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )


def _autoencoder() -> AutoencoderKLLTXVideo:
    return AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
    )


def build_ltx() -> LTXPipeline:
    """LTX-Video with a small autoencoder that reduces space by 4 and time by 4."""
    tokenizer = tokenizers.t5_tokenizer()
    with seeded():
        pipeline = LTXPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=_autoencoder(),
            text_encoder=text_encoders.t5(tokenizer),
            tokenizer=tokenizer,
            transformer=_transformer(),
        )
        return ready(pipeline)


LTX = Family(
    name="ltx",
    build=build_ltx,
    call={
        "width": 32,
        "height": 32,
        "num_frames": 9,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "max_sequence_length": 64,
    },
    kind="video",
    note="packed latents; guidance as one call with 2 B rows; sizes as plain integers, rope scales as floats",
)
