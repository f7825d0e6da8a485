"""Small text encoders, each for a tokenizer of `tokenizers`."""

from typing import Any

from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from .language_models import divisible


def clip_config(tokenizer: CLIPTokenizer, width: int = 32) -> CLIPTextConfig:
    """A two-layer CLIP text model that pools at the end token."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def clip(tokenizer: CLIPTokenizer, width: int = 32) -> CLIPTextModel:
    """A CLIP text encoder whose pooled output is the end token's state."""
    return CLIPTextModel(clip_config(tokenizer, width))


def projected_clip(tokenizer: CLIPTokenizer, width: int = 32) -> CLIPTextModelWithProjection:
    """A CLIP text encoder whose pooled output is projected."""
    return CLIPTextModelWithProjection(clip_config(tokenizer, width))


def _t5_sizes(tokenizer: PreTrainedTokenizerBase, width: int) -> dict[str, Any]:
    return {
        "vocab_size": divisible(len(tokenizer)),
        "d_model": width,
        "d_kv": width // 2,
        "d_ff": 2 * width,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 32,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def t5(tokenizer: PreTrainedTokenizerBase, width: int = 32) -> T5EncoderModel:
    """A two-layer T5 encoder."""
    return T5EncoderModel(T5Config(**_t5_sizes(tokenizer, width)))


def umt5(tokenizer: PreTrainedTokenizerBase, width: int = 32) -> UMT5EncoderModel:
    """A two-layer UMT5 encoder (relative positions in every layer)."""
    return UMT5EncoderModel(UMT5Config(**_t5_sizes(tokenizer, width)))
