"""Wan 2.1 and 2.2 (which has two of these transformers). The norms of queries and keys span all heads."""

from __future__ import annotations

from ..plan import Family, Style
from .blocks import QKV, attention, feed_forward, modulation

_SELF, _CROSS = "blocks.*.attn1", "blocks.*.attn2"
_NORMS: dict[str, Style] = {
    f"{path}.{norm}": "across_heads" for path in (_SELF, _CROSS) for norm in ("norm_q", "norm_k", "norm_added_k")
}
_IMAGE_KEYS: dict[str, Style] = {f"{_CROSS}.{name}": "colwise" for name in ("add_k_proj", "add_v_proj")}

FAMILIES = {
    "WanTransformer3DModel": Family(
        plan=attention(_SELF)
        | attention(_CROSS)
        | _NORMS
        | _IMAGE_KEYS
        | feed_forward("blocks.*.ffn")
        | modulation(("condition_embedder.time_proj",)),
        heads=("num_attention_heads",),
        divided={_SELF: ("heads",), _CROSS: ("heads",)},
        fused={_SELF: (QKV,), _CROSS: (("to_k", "to_v"), ("add_k_proj", "add_v_proj"))},
    )
}
