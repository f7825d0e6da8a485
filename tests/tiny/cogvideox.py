"""CogVideoX."""

from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from . import text_encoders, tokenizers
from .family import Family
from .weights import ready, seeded

TEXT_LENGTH = 226


def _transformer() -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=32,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=TEXT_LENGTH,
    )


def _autoencoder() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        sample_height=32,
        sample_width=32,
        scaling_factor=16.0,
    )


def build_cogvideox() -> CogVideoXPipeline:
    """CogVideoX with one block."""
    tokenizer = tokenizers.t5_tokenizer()
    with seeded():
        pipeline = CogVideoXPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoders.t5(tokenizer),
            vae=_autoencoder(),
            transformer=_transformer(),
            scheduler=CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
        )
        return ready(pipeline)


COGVIDEOX = Family(
    name="cogvideox",
    build=build_cogvideox,
    call={
        "width": 32,
        "height": 32,
        "num_frames": 9,
        "num_inference_steps": 3,
        "guidance_scale": 6.0,
        "max_sequence_length": TEXT_LENGTH,
    },
    kind="video",
    note="guidance as one call with 2 B rows; the prompt's length is fixed by the transformer",
)
