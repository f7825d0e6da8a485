"""The tokenizer and the text encoder that Wan has, T5's unigrams and UMT5, in miniature."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from ...train.text import TEXT_TOKENS, WIDTH, t5_tokenizer
from ..captions import vocabulary

__all__ = ["TEXT_TOKENS", "WIDTH", "embed", "new_umt5", "tokenize", "tokenizer"]


def tokenizer() -> T5Tokenizer:
    """Each word of a caption is one token; other words fall apart into letters."""
    return t5_tokenizer(vocabulary())


def new_umt5(words: T5Tokenizer, width: int = WIDTH) -> UMT5EncoderModel:
    """An untrained UMT5 encoder: ids [B, L] with their mask to a sequence [B, L, width]."""
    config = UMT5Config(
        vocab_size=len(words),
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
    )
    return UMT5EncoderModel(config)


def tokenize(words: T5Tokenizer, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, both [B, length], padded as `WanPipeline` pads them."""
    tokens = words(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def embed(encoder: UMT5EncoderModel, ids: Tensor, mask: Tensor) -> Tensor:
    """What the transformer reads, [B, L, width]: the text's hidden states, then zeros, as `WanPipeline` has it."""
    hidden: Tensor = encoder(ids, mask).last_hidden_state
    return torch.where(mask[:, :, None] > 0, hidden, 0.0)
