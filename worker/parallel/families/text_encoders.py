"""Large text encoders: T5, UMT5, Qwen2.5-VL, Qwen3, Llama. Word embeddings are sharded by rows.

Parts that the degree does not divide (an odd vocabulary, two key-value heads at four ranks) are replicated.
"""

from __future__ import annotations

from ..plan import Family, Style

_T5_ATTENTION = "encoder.block.*.layer.0.SelfAttention"
_T5_FEED = "encoder.block.*.layer.1.DenseReluDense"

_T5 = Family(
    plan={f"{_T5_ATTENTION}.{name}": "colwise" for name in ("q", "k", "v", "relative_attention_bias")}
    | {f"{_T5_FEED}.{name}": "colwise" for name in ("wi", "wi_0", "wi_1")}
    | {f"{_T5_ATTENTION}.o": "rowwise", f"{_T5_FEED}.wo": "rowwise"}
    | {"shared": "rowwise", "encoder.embed_tokens": "rowwise"},
    parts={_T5_ATTENTION: ("num_heads",), _T5_FEED: (), "shared": (), "encoder.embed_tokens": ()},
    divided={_T5_ATTENTION: ("n_heads", "inner_dim")},
    fused={_T5_ATTENTION: (("q", "k", "v"),), _T5_FEED: (("wi_0", "wi_1"),)},
)


def _decoder(prefix: str, head: str | None = None) -> Family:
    """A Llama-like language model with layers below ``prefix``; ``head`` is the output projection."""
    attention, mlp = f"{prefix}layers.*.self_attn", f"{prefix}layers.*.mlp"
    plan: dict[str, Style] = {f"{attention}.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj")}
    plan |= {f"{mlp}.{name}": "colwise" for name in ("gate_proj", "up_proj")}
    plan |= {f"{attention}.o_proj": "rowwise", f"{mlp}.down_proj": "rowwise", f"{prefix}embed_tokens": "rowwise"}
    if head is not None:
        plan[head] = "colwise_gather_output"
    words = {f"{prefix}embed_tokens": (), **({head: ()} if head is not None else {})}
    return Family(
        plan=plan,
        parts={attention: ("num_attention_heads", "num_key_value_heads"), mlp: (), **words},
        fused={attention: (("q_proj", "k_proj", "v_proj"),), mlp: (("gate_proj", "up_proj"),)},
    )


FAMILIES = {
    "T5EncoderModel": _T5,
    "UMT5EncoderModel": _T5,
    "Qwen2_5_VLForConditionalGeneration": _decoder("model.language_model.", "lm_head"),
    "Qwen2_5_VLTextModel": _decoder(""),
    "Qwen3ForCausalLM": _decoder("model.", "lm_head"),
    "Qwen3Model": _decoder(""),
    "LlamaForCausalLM": _decoder("model.", "lm_head"),
    "LlamaModel": _decoder(""),
}
