"""Sana."""

from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

from . import language_models, tokenizers
from .family import Family
from .weights import ready, seeded


def _transformer() -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=8,
    )


def _autoencoder() -> AutoencoderDC:
    return AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )


def build_sana() -> SanaPipeline:
    """Sana with a Gemma 2 text encoder and a deep-compression autoencoder that reduces by 4."""
    tokenizer = tokenizers.gemma_tokenizer()
    with seeded():
        pipeline = SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=language_models.gemma2(tokenizer),
            vae=_autoencoder(),
            transformer=_transformer(),
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        )
        return ready(pipeline)


SANA = Family(
    name="sana",
    build=build_sana,
    call={
        "width": 32,
        "height": 32,
        "num_inference_steps": 3,
        "guidance_scale": 4.5,
        "max_sequence_length": 64,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
    },
    kind="image",
    note="linear attention; guidance as one call with 2 B rows; resolution binning has to be off",
)
