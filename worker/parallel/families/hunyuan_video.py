"""HunyuanVideo and HunyuanVideo-1.5. A single block's ``proj_out`` takes [attention | mlp], in the ratio 1 to 4."""

from __future__ import annotations

from ...internals import diffusers as internals
from ..plan import Family
from .blocks import ADDED_QKV, QKV, attention, feed_forward, modulation

_BLOCK, _SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"
_REFINER = "context_embedder.token_refiner.refiner_blocks.*"

_REFINED = attention(f"{_REFINER}.attn") | feed_forward(f"{_REFINER}.ff") | modulation((f"{_REFINER}.norm_out.linear",))
_DOUBLE = (
    attention(f"{_BLOCK}.attn", joint=True)
    | feed_forward(f"{_BLOCK}.ff")
    | feed_forward(f"{_BLOCK}.ff_context")
    | modulation((f"{_BLOCK}.norm1.linear", f"{_BLOCK}.norm1_context.linear", "norm_out.linear"))
)

FAMILIES = {
    "HunyuanVideoTransformer3DModel": Family(
        plan=_REFINED
        | _DOUBLE
        | {f"{_SINGLE}.attn.{name}": "colwise" for name in QKV}
        | {f"{_SINGLE}.proj_mlp": "colwise", f"{_SINGLE}.proj_out": internals.PackedRowwiseParallel([1, 4])}
        | modulation((f"{_SINGLE}.norm.linear",)),
        heads=("num_attention_heads",),
        divided={f"{block}.attn": ("heads",) for block in (_BLOCK, _SINGLE, _REFINER)},
        fused={f"{_BLOCK}.attn": (QKV, ADDED_QKV), f"{_SINGLE}.attn": (QKV,), f"{_REFINER}.attn": (QKV,)},
        needs={"mlp_ratio": 4.0},
    ),
    "HunyuanVideo15Transformer3DModel": Family(
        plan=_REFINED | _DOUBLE,
        heads=("num_attention_heads",),
        divided={f"{block}.attn": ("heads",) for block in (_BLOCK, _REFINER)},
        fused={f"{_BLOCK}.attn": (QKV, ADDED_QKV), f"{_REFINER}.attn": (QKV,)},
    ),
}
