"""Tokenizers and text encoders as FLUX has them, CLIP for the pooled vector and T5 for the sequence, in miniature.

Each word of a caption is one token. Other words fall apart into letters, so any prompt can be tokenized; both
tokenizers fold capitals into small letters, and both do it with what their own file formats can keep.
"""

from __future__ import annotations

import io
import string
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from ..captions import vocabulary

TEXT_TOKENS = 32
"""Longest prompt, in tokens, that either tokenizer keeps; also the padded length of CLIP's input."""

WIDTH = 128
"""Hidden size of both text encoders."""

WORD_END = "</w>"
"""The marker of a word's end in CLIP's byte pairs."""

LETTERS = (*string.ascii_lowercase, *string.digits, *",.!?;:'-")
"""The letters that spell words outside the vocabulary."""


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer, with merges until each word of the vocabulary is one token."""
    words = [*vocabulary(), *LETTERS]
    alphabet = sorted({letter for word in words for letter in word})
    merges = _merges(words)
    pieces = [*alphabet, *(f"{letter}{WORD_END}" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *dict.fromkeys(pieces)]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_TOKENS)


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges in their order (Sennrich et al., 2016): the commonest pair first, of equals the first by name.

    Written out because the trainer of `tokenizers` breaks ties at random, and token ids must not change from one
    process to the next.
    """
    split = [[*word[:-1], word[-1] + WORD_END] for word in words]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for pieces in split for pair in pairwise(pieces)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        split = [_merged(pieces, best) for pieces in split]
        merges.append(best)
    return merges


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces with every occurrence of `pair`, from the left, made one."""
    result: list[str] = []
    for piece in pieces:
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return result


def t5_tokenizer(words: Sequence[str] = vocabulary()) -> T5Tokenizer:
    """T5's unigram tokenizer: a whole word of `words` is the likely reading, letters are a costly way out."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    whole = [(f"▁{word}", -1.0) for word in words]
    letters = [(letter, -10.0) for letter in ("▁", *LETTERS)]
    return T5Tokenizer(
        vocab=special + whole + letters,
        _spm_precompiled_charsmap=_lowercase_charsmap(),
        extra_ids=0,
        model_max_length=TEXT_TOKENS,
    )


def _lowercase_charsmap() -> bytes:
    """A to Z onto a to z, as sentencepiece compiles it: the one normalizer that T5's file format restores."""
    rules = "".join(f"{ord(letter):X}\t{ord(letter.lower()):X}\n" for letter in string.ascii_uppercase)
    written = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lowercase.tsv"
        path.write_text(rules)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a plain sentence to learn nothing from"] * 4),
            model_writer=written,
            vocab_size=40,
            hard_vocab_limit=False,
            normalization_rule_tsv=str(path),
            minloglevel=2,
        )
    normalizer_spec = _field(written.getvalue(), 3)
    return _field(normalizer_spec, 2)


def _field(message: bytes, number: int) -> bytes:
    """The bytes of a length-delimited field of a protocol buffer, whose other fields are so or single numbers.

    The numbers are those of sentencepiece_model.proto: `ModelProto.normalizer_spec` is 3, in it
    `precompiled_charsmap` is 2. Raises ValueError where the field is missing.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        value, after = _varint(message, at)
        if key & 7 == 5:  # four bytes, a float
            at += 4
        elif key & 7 == 0:
            at = after
        elif key >> 3 == number:
            return message[after : after + value]
        else:
            at = after + value
    raise ValueError(f"the sentencepiece model has no field {number}; is this sentencepiece older than 0.2?")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A variable-length number and where the next thing begins."""
    value = shift = 0
    while True:
        value |= (message[at] & 127) << shift
        shift += 7
        at += 1
        if message[at - 1] < 128:
            return value, at


def new_clip(tokenizer: CLIPTokenizer, width: int = WIDTH) -> CLIPTextModel:
    """An untrained CLIP text encoder: ids [B, 32] to a pooled vector [B, width]."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_t5(tokenizer: T5Tokenizer, width: int = WIDTH) -> T5EncoderModel:
    """An untrained T5 encoder: ids [B, L] to a sequence [B, L, width]. Padding is attended to, as FLUX does."""
    return T5EncoderModel(T5Config(**encoder_settings(tokenizer, width)))


def encoder_settings(tokenizer: T5Tokenizer, width: int) -> dict[str, Any]:
    """The configuration shared by the T5-family encoders: two layers, four heads."""
    return {
        "vocab_size": len(tokenizer),
        "d_model": width,
        "d_kv": width // 4,
        "d_ff": 2 * width,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
