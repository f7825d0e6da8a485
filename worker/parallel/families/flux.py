"""FLUX.1. The single blocks' ``proj_out`` takes [attention | mlp]; diffusers' plan shards each part separately."""

from __future__ import annotations

from ...internals import diffusers as internals
from ..plan import Family
from .blocks import ADDED_QKV, QKV, modulation

FAMILIES = {
    "FluxTransformer2DModel": Family(
        plan=internals.flux_plan
        | modulation(
            (
                "transformer_blocks.*.norm1.linear",
                "transformer_blocks.*.norm1_context.linear",
                "single_transformer_blocks.*.norm.linear",
                "norm_out.linear",
            )
        ),
        heads=("num_attention_heads",),
        fused={"transformer_blocks.*.attn": (QKV, ADDED_QKV), "single_transformer_blocks.*.attn": (QKV,)},
    )
}
