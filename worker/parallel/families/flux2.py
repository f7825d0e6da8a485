"""FLUX.2. The single blocks' fused ``to_qkv_mlp_proj`` is sharded part by part, as in diffusers' plan."""

from __future__ import annotations

from ...internals import diffusers as internals
from ..plan import Family
from .blocks import ADDED_QKV, QKV, modulation

FAMILIES = {
    "Flux2Transformer2DModel": Family(
        plan=internals.flux2_plan
        | modulation(
            (
                "double_stream_modulation_img.linear",
                "double_stream_modulation_txt.linear",
                "single_stream_modulation.linear",
                "norm_out.linear",
            )
        ),
        heads=("num_attention_heads",),
        fused={"transformer_blocks.*.attn": (QKV, ADDED_QKV)},
    )
}
