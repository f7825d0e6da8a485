"""Qwen-Image and Qwen-Image-Edit, which share a transformer class."""

from __future__ import annotations

from ...internals import diffusers as internals
from ..plan import Family
from .blocks import ADDED_QKV, QKV, modulation

FAMILIES = {
    "QwenImageTransformer2DModel": Family(
        plan=internals.qwen_image_plan
        | modulation(("transformer_blocks.*.img_mod.1", "transformer_blocks.*.txt_mod.1", "norm_out.linear")),
        heads=("num_attention_heads",),
        fused={"transformer_blocks.*.attn": (QKV, ADDED_QKV)},
    )
}
