"""LTX-Video. Norms span all heads, and so do the rotary embeddings, which are split by heads among the ranks."""

from __future__ import annotations

from ..plan import Family, Style
from .blocks import QKV, attention, feed_forward, modulation

_SELF, _CROSS = "transformer_blocks.*.attn1", "transformer_blocks.*.attn2"
_NORMS: dict[str, Style] = {
    f"{path}.{norm}": "across_heads" for path in (_SELF, _CROSS) for norm in ("norm_q", "norm_k")
}

FAMILIES = {
    "LTXVideoTransformer3DModel": Family(
        plan=attention(_SELF)
        | attention(_CROSS)
        | _NORMS
        | feed_forward("transformer_blocks.*.ff")
        | modulation(("time_embed.linear",))
        | {"rope": "split_output"},
        heads=("num_attention_heads",),
        divided={_SELF: ("heads",), _CROSS: ("heads",)},
        fused={_SELF: (QKV,), _CROSS: (("to_k", "to_v"),)},
    )
}
