"""Arguments that the tiny forms of a family of transformers share."""

from __future__ import annotations

from typing import Any

Arguments = dict[str, Any]

HEADS: Arguments = {"num_attention_heads": 2, "attention_head_dim": 16}
LATENT: Arguments = {"in_channels": 4, "out_channels": 4}
FLUX: Arguments = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "joint_attention_dim": 32,
}
SD3: Arguments = {
    **LATENT,
    **HEADS,
    "sample_size": 8,
    "patch_size": 2,
    "num_layers": 2,
    "joint_attention_dim": 64,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 32,
}
SANA: Arguments = {
    **LATENT,
    **HEADS,
    "patch_size": 1,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 32,
    "sample_size": 8,
}
QWEN_IMAGE: Arguments = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "axes_dims_rope": (8, 4, 4),
}
Z_IMAGE: Arguments = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 4,
    "dim": 96,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 4,
    "cap_feat_dim": 32,
    "axes_dims": [8, 8, 8],
    "axes_lens": [256, 32, 32],
}
HUNYUAN_DIT: Arguments = {
    "sample_size": 8,
    "patch_size": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "in_channels": 4,
    "cross_attention_dim": 32,
    "cross_attention_dim_t5": 32,
    "pooled_projection_dim": 16,
    "hidden_size": 32,
    "activation_fn": "gelu-approximate",
}
WAN: Arguments = {
    **LATENT,
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 64,
}
HUNYUAN_VIDEO: Arguments = {
    **LATENT,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "patch_size_t": 1,
    "text_embed_dim": 32,
    "pooled_projection_dim": 32,
    "rope_axes_dim": (4, 6, 6),
}
