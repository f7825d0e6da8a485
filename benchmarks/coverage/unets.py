"""Tiny forms of UNets, and of what goes with them, as keyword arguments by class name.

Latents have 4 channels, texts and summaries of texts are 32 wide, if a pipeline's own table does not say otherwise.
"""

from __future__ import annotations

from typing import Any

Arguments = dict[str, Any]

_HEADS: Arguments = {"num_attention_heads": 2, "attention_head_dim": 16}
_LATENT: Arguments = {"in_channels": 4, "out_channels": 4}
_UNET: Arguments = {
    **_LATENT,
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 32,
}
_UNET_3D: Arguments = {
    **_UNET,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "attention_head_dim": 4,
}
_CONTROLNET: Arguments = {
    "in_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 32,
    "conditioning_embedding_out_channels": (16, 32, 32, 32),
}

FORMS: dict[str, Arguments] = {
    "ControlNetModel": _CONTROLNET,
    "ControlNetXSAdapter": {
        "block_out_channels": (4, 8),
        "base_block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "num_attention_heads": 2,
        "cross_attention_dim": 32,
        "conditioning_embedding_out_channels": (16, 32, 32, 32),
        "max_norm_num_groups": 4,
    },
    "ControlNetUnionModel": {
        **_CONTROLNET,
        "num_trans_channel": 16,
        "num_proj_channel": 16,
        "num_trans_head": 2,
        "num_trans_layer": 1,
    },
    "DreamLiteUNetModel": {
        "sample_size": 8,
        "block_out_channels": (16, 16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
    },
    "I2VGenXLUNet": {**_UNET_3D, "num_attention_heads": 4, "attention_head_dim": 4},
    "Kandinsky3UNet": {
        "in_channels": 4,
        "time_embedding_dim": 4,
        "groups": 2,
        "attention_head_dim": 4,
        "layers_per_block": 3,
        "block_out_channels": (32, 64),
        "cross_attention_dim": 4,
        "encoder_hid_dim": 32,
    },
    "MotionAdapter": {
        "block_out_channels": (16, 32),
        "motion_layers_per_block": 1,
        "motion_norm_num_groups": 4,
        "motion_num_attention_heads": 2,
        "motion_max_seq_length": 16,
    },
    "PriorTransformer": {**_HEADS, "embedding_dim": 32, "num_layers": 1, "num_embeddings": 77},
    "StableUnCLIPImageNormalizer": {"embedding_dim": 32},
    "T2IAdapter": {
        "in_channels": 3,
        "channels": [16, 32],
        "num_res_blocks": 1,
        "downscale_factor": 8,
        "adapter_type": "full_adapter",
    },
    "UNet2DConditionModel": _UNET,
    "UNet2DModel": {
        **_LATENT,
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
    },
    "UNet3DConditionModel": _UNET_3D,
    "UNetSpatioTemporalConditionModel": {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "num_attention_heads": 4,
        "projection_class_embeddings_input_dim": 96,
        "addition_time_embed_dim": 32,
    },
    "UVit2DModel": {
        "hidden_size": 32,
        "cond_embed_dim": 32,
        "micro_cond_encode_dim": 8,
        "micro_cond_embed_dim": 40,
        "encoder_hidden_size": 32,
        "vocab_size": 34,
        "codebook_size": 32,
        "in_channels": 32,
        "block_out_channels": 32,
        "num_res_blocks": 1,
        "block_num_heads": 2,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "sample_size": 8,
    },
}
"""Keyed by class name."""
