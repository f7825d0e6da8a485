"""Checkpoints with random weights in the sizes of published models, for benchmarks on a GPU.

Denoisers and autoencoders have the configurations of their repositories (``config.json``), which are diffusers'
defaults where none is given here. FLUX.1-dev's text encoders are whole; the others' have their width and a few of their
layers, because a picture's time does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from safelight.tests.tiny import tokenizers
from safelight.tests.tiny.flux import build_flux
from safelight.tests.tiny.qwenimage import build_qwenimage
from safelight.tests.tiny.wan import build_wan
from safelight.tests.tiny.zimage import build_zimage

LAYERS = 4
"""Layers of the text encoders that are not whole."""


@dataclass(frozen=True)
class FullSize:
    """A published model: how it is built, and what one output of it is."""

    name: str
    build: Callable[[], DiffusionPipeline]
    build_tiny: Callable[[], DiffusionPipeline]
    output: Mapping[str, Any]
    """Fields of a request; they, and what ``extra`` has, are arguments of the pipeline."""
    tiny_sizes: Mapping[str, Any] = field(default_factory=lambda: {"width": 64, "height": 64})

    @property
    def tiny_output(self) -> dict[str, Any]:
        """The same fields for the model's tiny form, in two steps."""
        extra = {**self.output.get("extra", {}), "max_sequence_length": 64}
        return {**self.output, **self.tiny_sizes, "num_inference_steps": 2, "extra": extra}


def flux() -> FluxPipeline:
    """FLUX.1-dev: 11.9 billion parameters, and T5-XXL's encoder of 4.8 billion."""
    return FluxPipeline(
        scheduler=_euler(shift=3.0, use_dynamic_shifting=True),
        vae=_image_autoencoder(),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        ),
        tokenizer=tokenizers.clip_tokenizer(),
        text_encoder_2=T5EncoderModel(T5Config(**_T5_XXL, num_layers=24, vocab_size=32128)),
        tokenizer_2=tokenizers.t5_tokenizer(),
        transformer=FluxTransformer2DModel(guidance_embeds=True),
    )


def z_image() -> ZImagePipeline:
    """Z-Image: 6.2 billion parameters, beside a text encoder of Qwen3-4B's width."""
    return ZImagePipeline(
        scheduler=_euler(shift=3.0),
        vae=_image_autoencoder(),
        text_encoder=Qwen3Model(
            Qwen3Config(
                hidden_size=2560,
                intermediate_size=9728,
                num_hidden_layers=LAYERS,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=128,
            )
        ),
        tokenizer=tokenizers.qwen2_tokenizer(),
        transformer=ZImageTransformer2DModel(),
    )


def qwen_image() -> QwenImagePipeline:
    """Qwen-Image: 20 billion parameters, beside a text encoder of Qwen2.5-VL-7B's width."""
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": rope,
    }
    vision = {"depth": 1, "out_hidden_size": 3584}
    return QwenImagePipeline(
        scheduler=_euler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=tokenizers.qwen2_tokenizer(),
        transformer=QwenImageTransformer2DModel(),
    )


def wan() -> WanPipeline:
    """Wan 2.1 with 1.4 billion parameters, beside a text encoder of UMT5-XXL's width."""
    return WanPipeline(
        tokenizer=tokenizers.t5_tokenizer(),
        text_encoder=UMT5EncoderModel(UMT5Config(**_T5_XXL, num_layers=LAYERS, vocab_size=256384)),
        vae=AutoencoderKLWan(),
        scheduler=_unipc(flow_shift=3.0),
        transformer=WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    )


_T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "feed_forward_proj": "gated-gelu"}


def _euler(**shift: Any) -> FlowMatchEulerDiscreteScheduler:
    with torch.device("cpu"):
        return FlowMatchEulerDiscreteScheduler(**shift)


def _unipc(**shift: Any) -> UniPCMultistepScheduler:
    with torch.device("cpu"):
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, **shift)


def _image_autoencoder() -> AutoencoderKL:
    """FLUX's autoencoder, which Z-Image has too."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


SQUARE, WIDE = {"width": 1024, "height": 1024}, {"width": 832, "height": 480}
MODELS = {
    model.name: model
    for model in (
        FullSize("flux", flux, build_flux, {**SQUARE, "num_inference_steps": 28, "guidance_scale": 3.5}),
        FullSize("z-image", z_image, build_zimage, {**SQUARE, "num_inference_steps": 8, "guidance_scale": 0.0}),
        FullSize(
            "wan",
            wan,
            build_wan,
            {**WIDE, "num_frames": 33, "num_inference_steps": 20, "guidance_scale": 5.0, "output_format": "pt"},
            {"width": 32, "height": 32, "num_frames": 5},
        ),
        FullSize(
            "qwen-image",
            qwen_image,
            build_qwenimage,
            {**SQUARE, "num_inference_steps": 10, "negative_prompt": " ", "true_cfg_scale": 4.0},
        ),
    )
}
"""In the order in which they are measured."""


def built(model: FullSize, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> DiffusionPipeline:
    """The pipeline of ``model`` with random weights, made on ``device``, or its tiny form."""
    torch.manual_seed(0)
    if tiny:
        return model.build_tiny().to(device, dtype)
    with _made_on(device, dtype), torch.no_grad():
        pipeline = model.build()
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)  # its numbers in float32
    return pipeline.to(device, dtype)


@contextmanager
def _made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """New parameters are on ``device`` and of ``dtype``, so that nothing of full size is copied."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def saved(pipeline: DiffusionPipeline, directory: Path) -> float:
    """Save ``pipeline`` to ``directory``; the gigabytes of its weights."""
    pipeline.save_pretrained(directory, max_shard_size="5GB")
    return sum(file.stat().st_size for file in directory.rglob("*.safetensors")) / 1e9
