"""Tiny forms of what reads texts and pictures: encoders by class name, each made for its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from diffusers.pipelines.kandinsky import MultilingualCLIP
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig
from diffusers.pipelines.kolors import ChatGLMModel
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safelight.tests.tiny import language_models, text_encoders
from safelight.tests.tiny.language_models import WIDTH, divisible

Encoder = Callable[[PreTrainedTokenizerBase], PreTrainedModel]

MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
VISION_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
VISION_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def text_sizes(tokenizer: PreTrainedTokenizerBase, layers: int = 2, **options: Any) -> dict[str, Any]:
    """A decoder's configuration for the tokenizer's words; options as the configuration takes them."""
    return {
        "vocab_size": divisible(len(tokenizer)),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": WIDTH // 2,
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | options


def _decoder(name: str, config: str, layers: int = 2, **options: Any) -> Encoder:
    """A decoder of class ``name`` whose configuration has class ``config``."""

    def make(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        sizes = getattr(transformers, config)(**text_sizes(tokenizer, layers, **options))
        return getattr(transformers, name)(sizes)

    return make


def vision_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The numbers of the tokens that stand for pictures, as the Qwen configurations name them."""
    return dict(zip(VISION_IDS, map(tokenizer.convert_tokens_to_ids, VISION_TOKENS), strict=True))


def _vision_sizes(**options: Any) -> dict[str, Any]:
    return {"depth": 1, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_heads": 2} | options


def _seeing(name: str, config: str, layers: int, vision: dict[str, Any], **options: Any) -> Encoder:
    """A vision-language model of the Qwen kind."""

    def make(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        text = text_sizes(tokenizer, layers, rope_parameters=MROPE) | options
        sizes = getattr(transformers, config)(
            text_config=text, vision_config=_vision_sizes(**vision), **vision_ids(tokenizer)
        )
        return getattr(transformers, name)(sizes)

    return make


def qwen3_vl(name: str = "Qwen3VLForConditionalGeneration", layers: int = 2) -> Encoder:
    """A Qwen3-VL of as many layers as the pipeline reads from."""
    vision = {"out_hidden_size": WIDTH, "deepstack_visual_indexes": [0], "num_position_embeddings": 256}
    return _seeing(name, "Qwen3VLConfig", layers, vision)


def _gemma3(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    text = text_sizes(tokenizer, query_pre_attn_scalar=WIDTH // 2)
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )


def _mistral3(name: str, layers: int) -> Encoder:
    def make(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        vision = {
            "model_type": "pixtral",
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        }
        text = text_sizes(tokenizer, layers) | {"model_type": "mistral"}
        sizes = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=1)
        return getattr(transformers, name)(sizes)

    return make


def _bert(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    sizes = text_sizes(tokenizer)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return transformers.BertModel(transformers.BertConfig(**{name: sizes[name] for name in names}))


def _multilingual_clip(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    sizes = text_sizes(tokenizer)
    names = ("vocab_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = {name: sizes[name] for name in names} | {"hidden_size": WIDTH, "pad_token_id": 1}
    return MultilingualCLIP(MCLIPConfig(numDims=WIDTH, transformerDimensions=WIDTH, **config))


def long_clip(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A projected CLIP text encoder for as many tokens as HiDream's."""
    config = text_encoders.clip_config(tokenizer)
    config.max_position_embeddings = 248
    return transformers.CLIPTextModelWithProjection(config)


def _qwen3_vl_text(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return transformers.Qwen3VLTextModel(transformers.Qwen3VLTextConfig(**text_sizes(tokenizer, rope_parameters=MROPE)))


def _t5gemma(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    sizes = text_sizes(tokenizer, query_pre_attn_scalar=WIDTH // 2, dropout_rate=0.0)
    config = transformers.T5GemmaModuleConfig(**sizes)
    return transformers.models.t5gemma.modeling_t5gemma.T5GemmaEncoder(config)


def _t5gemma2(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    module = transformers.models.t5gemma2
    vision = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = module.configuration_t5gemma2.T5Gemma2EncoderConfig(
        text_config=text_sizes(tokenizer, query_pre_attn_scalar=WIDTH // 2, dropout_rate=0.0),
        vision_config=vision | {"image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4,
    )
    return module.modeling_t5gemma2.T5Gemma2Encoder(config)


def _qwen2_5_vl_text(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    config = language_models.qwen2_5_vl(tokenizer).config.text_config
    return transformers.Qwen2_5_VLTextModel(config)


def _chat_glm(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=divisible(len(tokenizer)),
        hidden_size=WIDTH,
        ffn_hidden_size=2 * WIDTH,
        kv_channels=8,
        num_attention_heads=4,
        seq_length=256,
        multi_query_attention=True,
        multi_query_group_num=2,
        original_rope=True,
    )
    model = ChatGLMModel(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # its norms leave theirs uninitialised
            torch.nn.init.ones_(parameter)
    return model


def _llava(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    vision = clip_vision_sizes() | {"model_type": "clip_vision_model"}
    text = text_sizes(tokenizer, layers=3) | {"model_type": "llama"}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=len(tokenizer) - 1)
    return transformers.LlavaForConditionalGeneration(config)


ENCODERS: dict[str, Encoder] = {
    "BertModel": _bert,
    "CLIPTextModel": text_encoders.clip,
    "CLIPTextModelWithProjection": text_encoders.projected_clip,
    "ChatGLMModel": _chat_glm,
    "Gemma2PreTrainedModel": language_models.gemma2,
    "Gemma3ForConditionalGeneration": _gemma3,
    "GemmaPreTrainedModel": _decoder("GemmaModel", "GemmaConfig"),
    "GlmModel": _decoder("GlmModel", "GlmConfig", layers=3),
    "LlamaForCausalLM": _decoder("LlamaForCausalLM", "LlamaConfig"),
    "LlamaModel": language_models.llama,
    "LlavaForConditionalGeneration": _llava,
    "Mistral3ForConditionalGeneration": _mistral3("Mistral3ForConditionalGeneration", layers=31),
    "Mistral3Model": _mistral3("Mistral3Model", layers=3),
    "MultilingualCLIP": _multilingual_clip,
    "PreTrainedModel": language_models.qwen3,
    "Qwen2VLForConditionalGeneration": _seeing(
        "Qwen2VLForConditionalGeneration", "Qwen2VLConfig", 2, {"embed_dim": WIDTH}, num_attention_heads=2
    ),
    "Qwen2_5_VLForConditionalGeneration": language_models.qwen2_5_vl,
    "Qwen2_5_VLTextModel": _qwen2_5_vl_text,
    "Qwen3ForCausalLM": language_models.deep_qwen3,
    "Qwen3Model": language_models.qwen3,
    "Qwen3VLForConditionalGeneration": qwen3_vl(),
    "Qwen3VLModel": qwen3_vl("Qwen3VLModel"),
    # BriaFibo puts the number of Llama 3's first special token in place of an empty prompt
    "Qwen3VLTextModel": _qwen3_vl_text,
    "SmolLM3ForCausalLM": _decoder("SmolLM3ForCausalLM", "SmolLM3Config", vocab_size=128_008),
    "T5EncoderModel": text_encoders.t5,
    "T5Gemma2Encoder": _t5gemma2,
    "T5GemmaEncoder": _t5gemma,
    "UMT5EncoderModel": text_encoders.umt5,
}
"""Text encoders by the class that a pipeline asks for."""


def clip_vision_sizes() -> dict[str, Any]:
    """A CLIP vision tower of one layer for pictures of 32 pixels."""
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "projection_dim": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }


def _siglip_sizes() -> dict[str, Any]:
    return {name: size for name, size in clip_vision_sizes().items() if name != "projection_dim"}


def large_seeing(_: Any) -> PreTrainedModel:
    """A CLIP vision tower for pictures of 224 pixels, to which some pipelines resize in code."""
    config = transformers.CLIPVisionConfig(**clip_vision_sizes() | {"image_size": 224, "patch_size": 32})
    return transformers.CLIPVisionModelWithProjection(config)


SEEING: dict[str, Callable[[], PreTrainedModel]] = {
    "CLIPVisionModel": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**clip_vision_sizes())),
    "CLIPVisionModelWithProjection": lambda: transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**clip_vision_sizes())
    ),
    "SiglipVisionModel": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**_siglip_sizes())),
    "StableDiffusionSafetyChecker": lambda: StableDiffusionSafetyChecker(
        transformers.CLIPConfig(
            vision_config=clip_vision_sizes(), text_config={"hidden_size": WIDTH, "num_hidden_layers": 1}
        )
    ),
    "Siglip2VisionModel": lambda: transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(**_siglip_sizes() | {"num_patches": 256, "patch_size": 16})
    ),
}
"""Encoders of pictures, by class."""
