"""HunyuanVideo-1.5."""

from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from transformers import ByT5Tokenizer

from . import language_models, text_encoders, tokenizers
from .family import Family
from .weights import ready, seeded


def _transformer() -> HunyuanVideo15Transformer3DModel:
    """Its input is latents, a picture's latents and a mask: 4 + 4 + 1 channels."""
    return HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=language_models.WIDTH,
        text_embed_2_dim=32,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
        target_size=64,
        task_type="t2v",
    )


def _autoencoder() -> AutoencoderKLHunyuanVideo15:
    return AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )


def build_hunyuan_video15() -> HunyuanVideo15Pipeline:
    """HunyuanVideo-1.5 for text: Qwen2.5-VL's language model for the prompt, ByT5 for the words in quotes."""
    qwen_tokenizer, byte_tokenizer = tokenizers.qwen2_tokenizer(), ByT5Tokenizer()
    with seeded():
        pipeline = HunyuanVideo15Pipeline(
            text_encoder=language_models.qwen2_5_vl_text(qwen_tokenizer),
            tokenizer=qwen_tokenizer,
            transformer=_transformer(),
            vae=_autoencoder(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            text_encoder_2=text_encoders.t5(byte_tokenizer),
            tokenizer_2=byte_tokenizer,
            guider=ClassifierFreeGuidance(guidance_scale=6.0),
        )
        return ready(pipeline)


HUNYUAN_VIDEO15 = Family(
    name="hunyuan_video15",
    build=build_hunyuan_video15,
    call={"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 3},
    kind="video",
    note="guidance by a guider, as two calls in a row; 1985 tokens of conditions, most of them masked",
)
