"""The tokenizer and the text encoder that Wan has, T5's unigrams and UMT5, in miniature."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from ...scene import COLOURS, SHAPES
from ...train.text import TEXT_TOKENS, WIDTH, encoder_settings, t5_tokenizer
from ..captions import vocabulary
from ..clip import DIRECTIONS

__all__ = ["ROLES", "TEXT_TOKENS", "WIDTH", "embed", "new_umt5", "role_loss", "roles", "tokenize", "tokenizer"]

ROLES = ("other", "colour", "shape", "direction", "background")
"""The roles of a caption's words."""


def tokenizer() -> T5Tokenizer:
    """Each word of a caption is one token; other words fall apart into letters."""
    return t5_tokenizer(vocabulary())


def new_umt5(words: T5Tokenizer, width: int = WIDTH) -> UMT5EncoderModel:
    """An untrained UMT5 encoder: ids [B, L] with their mask to a sequence [B, L, width]."""
    return UMT5EncoderModel(UMT5Config(**encoder_settings(words, width)))


def tokenize(words: T5Tokenizer, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, both [B, length], padded as `WanPipeline` pads them."""
    tokens = words(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def roles(words: T5Tokenizer, ids: Tensor, mask: Tensor) -> Tensor:
    """The role of each token, [B, length] of indices into `ROLES`; -100 for padding.

    Only its place determines a colour's role: the first is the shape's, the second the background's.
    """
    found = torch.zeros_like(ids)
    for role, known in (("shape", SHAPES), ("direction", DIRECTIONS)):
        found[torch.isin(ids, _ids(words, known))] = ROLES.index(role)
    coloured = torch.isin(ids, _ids(words, COLOURS))
    second = coloured & (coloured.cumsum(dim=1) > 1)
    found[coloured & ~second], found[second] = ROLES.index("colour"), ROLES.index("background")
    return torch.where(mask > 0, found, -100)


def role_loss(logits: Tensor, words: T5Tokenizer, ids: Tensor, mask: Tensor) -> Tensor:
    """The cross entropy of `logits` [B, length, 5] over `ROLES`."""
    wanted = roles(words, ids, mask).flatten().to(logits.device)
    return functional.cross_entropy(logits.float().flatten(0, 1), wanted)


def _ids(words: T5Tokenizer, known: Iterable[str]) -> Tensor:
    return torch.tensor([words.encode(word, add_special_tokens=False)[-1] for word in known])


def embed(encoder: UMT5EncoderModel, ids: Tensor, mask: Tensor) -> Tensor:
    """The transformer's text input, [B, L, width]: the hidden states, then zeros, as in `WanPipeline`."""
    hidden: Tensor = encoder(ids, mask).last_hidden_state
    return torch.where(mask[:, :, None] > 0, hidden, 0.0)
