"""Small decoder language models and vision-language models that pipelines use as text encoders."""

from typing import Any

from transformers import (
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

WIDTH = 32


def divisible(count: int) -> int:
    """The next multiple of 8, as vocabularies are padded to be divided among ranks."""
    return -(-count // 8) * 8


def _sizes(tokenizer: PreTrainedTokenizerBase, layers: int = 2) -> dict[str, Any]:
    return {
        "vocab_size": divisible(len(tokenizer)),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": WIDTH // 2,
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def qwen3(tokenizer: PreTrainedTokenizerBase) -> Qwen3Model:
    """A two-layer Qwen3 without a language-model head."""
    return Qwen3Model(Qwen3Config(**_sizes(tokenizer)))


def deep_qwen3(tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """A Qwen3 of 27 layers with a language-model head, for pipelines that read the layers 9, 18 and 27."""
    return Qwen3ForCausalLM(Qwen3Config(**_sizes(tokenizer, layers=27)))


def llama(tokenizer: PreTrainedTokenizerBase) -> LlamaModel:
    """A three-layer Llama, for pipelines that skip the last two layers."""
    return LlamaModel(LlamaConfig(**_sizes(tokenizer, layers=3)))


def gemma2(tokenizer: PreTrainedTokenizerBase) -> Gemma2Model:
    """A two-layer Gemma 2: one layer with a sliding window, one without."""
    return Gemma2Model(Gemma2Config(**_sizes(tokenizer), query_pre_attn_scalar=WIDTH // 2))


def _vision_sizes() -> dict[str, Any]:
    return {
        "depth": 1,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
    }


def _qwen2_5_vl_text_sizes(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    sizes = {key: value for key, value in _sizes(tokenizer, layers=3).items() if key != "head_dim"}
    return {**sizes, "num_attention_heads": 4, "rope_parameters": rope}


def qwen2_5_vl_text(tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLTextModel:
    """The language model of a Qwen2.5-VL alone, for pipelines that skip the last two of its three layers."""
    return Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**_qwen2_5_vl_text_sizes(tokenizer)))


def qwen2_5_vl(tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLForConditionalGeneration:
    """A three-layer Qwen2.5-VL with a one-layer vision tower."""
    ids = {
        key: tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for key, token in (
            ("image_token_id", "image_pad"),
            ("video_token_id", "video_pad"),
            ("vision_start_token_id", "vision_start"),
            ("vision_end_token_id", "vision_end"),
        )
    }
    text, vision = _qwen2_5_vl_text_sizes(tokenizer), _vision_sizes()
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
