"""Parts of a text encoder that the degree does not divide are replicated, and the rest is sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from safelight.tests.ranks import on_ranks
from safelight.tests.worker.replicating import divides_what_it_can

_T5_ATTENTION, _T5_FEED = "encoder.block.*.layer.0.SelfAttention", "encoder.block.*.layer.1.DenseReluDense"
_T5_WORDS = {"shared", "encoder.embed_tokens"}


def _t5(**changes: int) -> dict[str, Any]:
    return {"vocab_size": 16, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4, "num_layers": 2} | changes


def _decoder(**changes: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
    return sizes | {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0} | changes


def _encoders() -> dict[str, tuple[Any, set[str]]]:
    """Each with the parts that two ranks cannot divide."""
    return {
        "odd vocabulary": (T5EncoderModel(T5Config(**_t5(vocab_size=17))), _T5_WORDS),
        "odd heads": (T5EncoderModel(T5Config(**_t5(num_heads=3))), {_T5_ATTENTION}),
        "odd everything": (
            UMT5EncoderModel(UMT5Config(**_t5(num_heads=3, d_ff=9, vocab_size=17))),
            {_T5_ATTENTION, _T5_FEED, *_T5_WORDS},
        ),
        "one key-value head": (Qwen3Model(Qwen3Config(**_decoder(num_key_value_heads=1))), {"layers.*.self_attn"}),
        "odd feed-forward": (LlamaModel(LlamaConfig(**_decoder(intermediate_size=25))), {"layers.*.mlp"}),
        "tied words": (
            Qwen3ForCausalLM(Qwen3Config(**_decoder(vocab_size=17), tie_word_embeddings=True)),
            {"model.embed_tokens", "lm_head"},
        ),
        "nothing odd": (Qwen3Model(Qwen3Config(**_decoder())), set()),
    }


def test_parts_that_two_ranks_do_not_divide_compute_and_update_as_on_one_and_are_reported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = {}
    for called, (encoder, whole) in _encoders().items():
        encoder.save_pretrained(tmp_path / called)
        given[called] = (type(encoder), tmp_path / called, whole)
    on_ranks(2, divides_what_it_can, given)
