"""Stable Diffusion 3 and 3.5. The first blocks of 3.5 have a second attention over the picture alone."""

from __future__ import annotations

from ..plan import Family
from .blocks import ADDED_QKV, QKV, attention, feed_forward, modulation

_BLOCK = "transformer_blocks.*"

FAMILIES = {
    "SD3Transformer2DModel": Family(
        plan=attention(f"{_BLOCK}.attn", joint=True)
        | attention(f"{_BLOCK}.attn2")
        | feed_forward(f"{_BLOCK}.ff")
        | feed_forward(f"{_BLOCK}.ff_context")
        | modulation((f"{_BLOCK}.norm1.linear", f"{_BLOCK}.norm1_context.linear", "norm_out.linear")),
        heads=("num_attention_heads",),
        divided={f"{_BLOCK}.attn": ("heads",), f"{_BLOCK}.attn2": ("heads",)},
        fused={f"{_BLOCK}.attn": (QKV, ADDED_QKV), f"{_BLOCK}.attn2": (QKV,)},
    )
}
