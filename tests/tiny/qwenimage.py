"""Qwen-Image and Qwen-Image-Edit."""

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image
from transformers import PaddleOCRVLProcessor, PreTrainedTokenizerBase
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil

from . import language_models, tokenizers
from .family import Family
from .weights import ready, seeded


def _transformer() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )


def _autoencoder() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0, 0.1, -0.1, 0.2],
        latents_std=[1.0, 1.1, 0.9, 1.2],
    )


def build_qwenimage() -> QwenImagePipeline:
    """Qwen-Image with a Qwen2.5-VL text encoder."""
    tokenizer = tokenizers.qwen2_tokenizer()
    with seeded():
        pipeline = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=_autoencoder(),
            text_encoder=language_models.qwen2_5_vl(tokenizer),
            tokenizer=tokenizer,
            transformer=_transformer(),
        )
        return ready(pipeline)


def _processor(tokenizer: PreTrainedTokenizerBase) -> PaddleOCRVLProcessor:
    """Patches as Qwen2-VL's own processor lays them out; that one cannot be made where torchvision is missing."""
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    return PaddleOCRVLProcessor(PaddleOCRVLImageProcessorPil(size=pixels, temporal_patch_size=2), tokenizer)


def _narrow_autoencoder() -> AutoencoderKLQwenImage:
    """Reduces space by 32 with the least width: the pipeline enlarges every picture that it is given to 1024²."""
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, False, False, True, True],
        latents_mean=[0.0, 0.1, -0.1, 0.2],
        latents_std=[1.0, 1.1, 0.9, 1.2],
    )


def build_qwenimage_edit() -> QwenImageEditPipeline:
    """Qwen-Image-Edit, whose text encoder sees the picture too."""
    tokenizer = tokenizers.qwen2_tokenizer()
    with seeded():
        pipeline = QwenImageEditPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=_narrow_autoencoder(),
            text_encoder=language_models.qwen2_5_vl(tokenizer),
            tokenizer=tokenizer,
            processor=_processor(tokenizer),
            transformer=_transformer(),
        )
        return ready(pipeline)


QWENIMAGE = Family(
    name="qwenimage",
    build=build_qwenimage,
    call={
        "width": 64,
        "height": 64,
        "num_inference_steps": 3,
        "true_cfg_scale": 3.0,
        "negative_prompt": "blurry",
        "max_sequence_length": 64,
    },
    kind="image",
    note="guidance as two calls in a row, under cache_context; img_shapes is a list of lists of tuples",
)

QWENIMAGE_EDIT = Family(
    name="qwenimage_edit",
    build=build_qwenimage_edit,
    call={
        "image": Image.linear_gradient("L").resize((64, 64)).convert("RGB"),
        "width": 128,
        "height": 128,
        "num_inference_steps": 3,
        "true_cfg_scale": 3.0,
        "negative_prompt": "blurry",
        "max_sequence_length": 64,
    },
    kind="image",
    note="the picture is encoded by the VAE and, with the prompt, by the text encoder; its latents follow the noise",
)
