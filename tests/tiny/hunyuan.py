"""HunyuanVideo and HunyuanImage 2.1."""

from diffusers import (
    AdaptiveProjectedMixGuidance,
    AutoencoderKLHunyuanImage,
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from transformers import ByT5Tokenizer

from . import language_models, text_encoders, tokenizers
from .family import Family
from .weights import ready, seeded


def _video_transformer() -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=32,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 6, 6),
    )


def _video_autoencoder() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def build_hunyuan_video() -> HunyuanVideoPipeline:
    """HunyuanVideo: distilled guidance, Llama for the prompt and CLIP for its summary."""
    llama_tokenizer, clip_tokenizer = tokenizers.llama_tokenizer(), tokenizers.clip_tokenizer()
    with seeded():
        pipeline = HunyuanVideoPipeline(
            text_encoder=language_models.llama(llama_tokenizer),
            tokenizer=llama_tokenizer,
            transformer=_video_transformer(),
            vae=_video_autoencoder(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=text_encoders.clip(clip_tokenizer),
            tokenizer_2=clip_tokenizer,
        )
        return ready(pipeline)


def _image_transformer() -> HunyuanImageTransformer2DModel:
    # The projection of the glyph encoder's states has a fixed width of 2048: 17 MB, so it is left out.
    return HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=32,
        text_embed_2_dim=None,
        rope_axes_dim=(8, 8),
    )


def _image_autoencoder() -> AutoencoderKLHunyuanImage:
    return AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=8,
        sample_size=64,
        scaling_factor=0.5,
    )


def build_hunyuan_image() -> HunyuanImagePipeline:
    """HunyuanImage 2.1 whose guiders keep a momentum from step to step, from the first step on."""
    qwen_tokenizer, byte_tokenizer = tokenizers.qwen2_tokenizer(), ByT5Tokenizer()
    with seeded():
        pipeline = HunyuanImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            vae=_image_autoencoder(),
            text_encoder=language_models.qwen2_5_vl(qwen_tokenizer),
            tokenizer=qwen_tokenizer,
            text_encoder_2=text_encoders.t5(byte_tokenizer),
            tokenizer_2=byte_tokenizer,
            transformer=_image_transformer(),
            guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=0),
            ocr_guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1),
        )
        return ready(pipeline)


HUNYUAN_VIDEO = Family(
    name="hunyuan_video",
    build=build_hunyuan_video,
    call={
        "width": 32,
        "height": 32,
        "num_frames": 5,
        "num_inference_steps": 3,
        "guidance_scale": 6.0,
        "max_sequence_length": 64,
    },
    kind="video",
    note="distilled guidance: one call a step; a long template before the prompt, cropped after encoding",
)

HUNYUAN_IMAGE = Family(
    name="hunyuan_image",
    build=build_hunyuan_image,
    call={"width": 64, "height": 64, "num_inference_steps": 3},
    kind="image",
    note="troublesome: the guider, a shared component, keeps step, timestep and momentum of the request in progress",
)
