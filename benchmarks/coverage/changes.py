"""Changes of a tiny form beyond its components' own forms, and the changes to those that several pipelines share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from safelight.tests.tiny import text_encoders

from .parts import Other

Changes = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tiny:
    """``changes`` are those of :class:`Parts`; ``call`` are arguments of a request besides the prompt."""

    changes: Changes = field(default_factory=dict)
    call: Changes = field(default_factory=dict)


SDXL_UNET: Changes = {
    "cross_attention_dim": 64,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 2),
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}
SDXL: Changes = {"unet": SDXL_UNET}
SD: Changes = {"requires_safety_checker": False}
LONG_CAT: Changes = {"transformer": {"in_channels": 64}, "vae": {"latent_channels": 16}}
ONE_TRANSFORMER: Changes = {"transformer": ...}
PIXEL_UNET: Changes = {
    "unet": {
        "in_channels": 3,
        "out_channels": 6,
        "block_out_channels": (32, 64),
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "encoder_hid_dim": 32,
        "attention_head_dim": 4,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
        "cross_attention_norm": "group_norm",
        "resnet_time_scale_shift": "scale_shift",
        "act_fn": "gelu",
    },
    "scheduler": {"thresholding": True, "dynamic_thresholding_ratio": 0.95, "prediction_type": "epsilon"}
    | {"variance_type": "learned_range"},
    "requires_safety_checker": False,
}
SIMPLE_UNET: Changes = {
    "out_channels": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "encoder_hid_dim": 32,
    "attention_head_dim": 4,
    "resnet_time_scale_shift": "scale_shift",
}
KANDINSKY: Changes = {
    "unet": SIMPLE_UNET | {"addition_embed_type": "text_image", "encoder_hid_dim_type": "text_image_proj"},
    "prior_image_encoder": ...,
    "prior_image_processor": ...,
}
KANDINSKY_2_2: Changes = {
    "unet": SIMPLE_UNET | {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj"},
    "prior_image_encoder": ...,
    "prior_image_processor": ...,
}
VQ_IMAGE: Changes = {"norm_type": "group", "down_block_types": ("DownEncoderBlock2D",) * 2} | {
    "up_block_types": ("UpDecoderBlock2D",) * 2
}
AMUSED: Changes = {
    "vqvae": VQ_IMAGE
    | {"latent_channels": 32, "vq_embed_dim": 32, "num_vq_embeddings": 32, "lookup_from_codebook": True}
    | {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "mid_block_add_attention": False}
    | {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4},
    "scheduler": {"mask_token_id": 33},
}
SD3: Changes = {"text_encoder_3": lambda tokenizer: text_encoders.t5(tokenizer, width=64)}
UNPACKED_SANA: Changes = {"scheduler": Other("FlowMatchEulerDiscreteScheduler")}
PLAIN_DPM: Changes = {"prediction_type": "epsilon", "use_flow_sigmas": False}
HUNYUAN_DIT: Changes = {"requires_safety_checker": False}
SHORT: Changes = {"max_sequence_length": 64}
UMT5: Changes = {"text_encoder": Other("UMT5EncoderModel")}
CASCADING_PIXELS: Changes = PIXEL_UNET | {
    "unet": PIXEL_UNET["unet"] | {"in_channels": 6, "class_embed_type": "timestep"}
}
KOLORS: Changes = {"unet": SDXL_UNET | {"cross_attention_dim": 32}}
