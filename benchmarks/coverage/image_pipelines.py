"""Tiny forms of pipelines that take pictures: what they need beyond the forms of their components' classes."""

from __future__ import annotations

from typing import Any

from diffusers import ClassifierFreeGuidance

from .changes import (
    AMUSED,
    CASCADING_PIXELS,
    HUNYUAN_DIT,
    KANDINSKY,
    KANDINSKY_2_2,
    KOLORS,
    LONG_CAT,
    PIXEL_UNET,
    SD,
    SD3,
    SDXL,
    SDXL_UNET,
    SHORT,
    UMT5,
    Tiny,
)
from .encoders import large_seeing
from .parts import Other

Changes = dict[str, Any]

SEEN: Changes = {"image_encoder": ..., "feature_extractor": ...}
SEEN_BY_WAN: Changes = {"image_encoder": ..., "image_processor": ...}
SHIFTED: Changes = {"scheduler": {"use_dynamic_shifting": True}}
FLUX_CONTROL: Changes = SHIFTED | {"transformer": {"in_channels": 32, "out_channels": 16}}
MASKED_UNET: Changes = {"in_channels": 9}
ATTENTIVE_FIRST: Changes = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
IN_BLOCK: Changes = {"pag_applied_layers": "mid"}
XL_CONTROL: Changes = {"unet": SDXL_UNET, "controlnet": SDXL_UNET}
CONTROLLED_WITHIN: Changes = {"layers_per_block": 2, "use_linear_projection": True}
"""A UNet that ControlNet-XS joins its own layers to, one by one."""

WAN_SEEING: Changes = {"transformer": {"in_channels": 12, "image_dim": 32}}
FOR_MEGAPIXELS: Changes = {
    "block_out_channels": (4,) * 6,
    "down_block_types": ("DownEncoderBlock2D",) * 6,
    "up_block_types": ("UpDecoderBlock2D",) * 6,
}
"""An autoencoder that reduces by 32, for pipelines that enlarge every picture to a megapixel."""

WAN_FOR_MEGAPIXELS: Changes = {
    "vae": {"base_dim": 4, "dim_mult": [1] * 6, "temperal_downsample": [False, True, True, False, False]}
}
"""The same of the autoencoders of Wan and Qwen."""

MASK_AND_CONDITION: Changes = {"in_channels": 288, "out_channels": 16}
"""FLUX.1 Fill: 16 packed channels of noise, 16 of the masked picture, and 8 by 8 by 4 pixels of mask."""

TINY: dict[str, Tiny] = {
    "AmusedImg2ImgPipeline": Tiny(AMUSED),
    "AmusedInpaintPipeline": Tiny(AMUSED),
    "BriaFiboEditPipeline": Tiny({}, SHORT),
    "ChromaImg2ImgPipeline": Tiny(SHIFTED, SHORT),
    "ChromaInpaintPipeline": Tiny(SHIFTED, SHORT),
    "ChronoEditPipeline": Tiny(SEEN_BY_WAN, SHORT),
    "CogVideoXImageToVideoPipeline": Tiny(
        {"scheduler": Other("CogVideoXDDIMScheduler"), "transformer": {"in_channels": 8}}
    ),
    "CogView4ControlPipeline": Tiny(SHIFTED | {"transformer": {"in_channels": 8}}, SHORT),
    "CycleDiffusionPipeline": Tiny(SD, {"source_prompt": "a blue square"}),
    "Flux2KleinInpaintPipeline": Tiny(SHIFTED, SHORT),
    "FluxControlImg2ImgPipeline": Tiny(FLUX_CONTROL, SHORT),
    "FluxControlInpaintPipeline": Tiny(FLUX_CONTROL, SHORT),
    "FluxControlNetImg2ImgPipeline": Tiny(SHIFTED, SHORT),
    "FluxControlNetInpaintPipeline": Tiny(SHIFTED, SHORT),
    "FluxControlNetPipeline": Tiny(SHIFTED, SHORT),
    "FluxControlPipeline": Tiny(FLUX_CONTROL, SHORT),
    "FluxFillPipeline": Tiny(SHIFTED | {"transformer": MASK_AND_CONDITION}, SHORT),
    "FluxImg2ImgPipeline": Tiny(SHIFTED, SHORT),
    "FluxInpaintPipeline": Tiny(SHIFTED, SHORT),
    "FluxKontextInpaintPipeline": Tiny(SHIFTED | {"vae": FOR_MEGAPIXELS}, SHORT),
    "FluxKontextPipeline": Tiny(SHIFTED | {"vae": FOR_MEGAPIXELS}, SHORT),
    "HunyuanDiTControlNetPipeline": Tiny(HUNYUAN_DIT, {"use_resolution_binning": False}),
    "HunyuanImageRefinerPipeline": Tiny(
        {
            "guider": ClassifierFreeGuidance(guidance_scale=3.0),
            "transformer": {"in_channels": 8, "patch_size": (1, 1, 1), "rope_axes_dim": (4, 6, 6)},
        }
    ),
    "HunyuanSkyreelsImageToVideoPipeline": Tiny({"transformer": {"in_channels": 8}}, SHORT),
    "HunyuanVideo15ImageToVideoPipeline": Tiny(
        SEEN | {"guider": ClassifierFreeGuidance(guidance_scale=3.0), "transformer": {"task_type": "i2v"}}
    ),
    "HunyuanVideoFramepackPipeline": Tiny(SEEN, SHORT),
    "HunyuanVideoImageToVideoPipeline": Tiny(
        {"transformer": {"in_channels": 9, "image_condition_type": "latent_concat"}}, SHORT
    ),
    "I2VGenXLPipeline": Tiny(SEEN),
    "IFImg2ImgPipeline": Tiny(PIXEL_UNET),
    "IFInpaintingPipeline": Tiny(PIXEL_UNET),
    "IFSuperResolutionPipeline": Tiny(CASCADING_PIXELS),
    "KandinskyImg2ImgCombinedPipeline": Tiny(KANDINSKY),
    "KandinskyInpaintCombinedPipeline": Tiny(KANDINSKY | {"unet": KANDINSKY["unet"] | MASKED_UNET}),
    "KandinskyV22Img2ImgCombinedPipeline": Tiny(KANDINSKY_2_2),
    "KandinskyV22InpaintCombinedPipeline": Tiny(KANDINSKY_2_2 | {"unet": KANDINSKY_2_2["unet"] | MASKED_UNET}),
    "KolorsImg2ImgPipeline": Tiny(KOLORS),
    "LDMSuperResolutionPipeline": Tiny(
        {"unet": {"in_channels": 6, "out_channels": 3}, "vqvae": {"latent_channels": 3, "vq_embed_dim": 3}}
    ),
    "LTX2ImageToVideoPipeline": Tiny({}, SHORT),
    "LTXImageToVideoPipeline": Tiny(SHIFTED, SHORT),
    "LatentConsistencyModelImg2ImgPipeline": Tiny(SD | {"unet": {"time_cond_proj_dim": 16}}),
    "MotifVideoImage2VideoPipeline": Tiny(
        {
            "scheduler": Other("FlowMatchEulerDiscreteScheduler"),
            "guider": ClassifierFreeGuidance(guidance_scale=3.0),
            "feature_extractor": ...,
            "transformer": {"image_embed_dim": 32},
        },
        SHORT,
    ),
    "PIAPipeline": Tiny({"motion_adapter": {"conv_in_channels": 9}}),
    "LongCatImageEditPipeline": Tiny(LONG_CAT | {"vae": FOR_MEGAPIXELS | LONG_CAT["vae"]}),
    "JoyImageEditPlusPipeline": Tiny(WAN_FOR_MEGAPIXELS),
    "QwenImageEditInpaintPipeline": Tiny(WAN_FOR_MEGAPIXELS),
    "QwenImageLayeredPipeline": Tiny(WAN_FOR_MEGAPIXELS),
    "QwenImageControlNetInpaintPipeline": Tiny(
        SHIFTED | {"controlnet": {"extra_condition_channels": 4}}, SHORT | {"true_cfg_scale": 1.0}
    ),
    "QwenImageControlNetPipeline": Tiny(SHIFTED, SHORT),
    "QwenImageImg2ImgPipeline": Tiny(SHIFTED, SHORT),
    "QwenImageInpaintPipeline": Tiny(SHIFTED, SHORT),
    "SanaControlNetPipeline": Tiny({}, SHORT | {"complex_human_instruction": None}),
    "SanaImageToVideoPipeline": Tiny({"vae": Other("AutoencoderKLWan")}, SHORT),
    "SanaSprintImg2ImgPipeline": Tiny(
        {
            "scheduler": Other("SCMScheduler"),
            "transformer": {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
        },
        SHORT | {"complex_human_instruction": None, "num_inference_steps": 2},
    ),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": Tiny(UMT5, SHORT | {"base_num_frames": 9}),
    "SkyReelsV2ImageToVideoPipeline": Tiny(
        UMT5 | WAN_SEEING | {"image_encoder": ..., "image_processor": Other("CLIPImageProcessor")}, SHORT
    ),
    "StableDiffusion3ControlNetInpaintingPipeline": Tiny(
        SD3 | {"controlnet": {"extra_conditioning_channels": 1}}, SHORT
    ),
    "StableDiffusion3ControlNetPipeline": Tiny(SD3, SHORT),
    "StableDiffusion3Img2ImgPipeline": Tiny(SD3, SHORT),
    "StableDiffusion3InpaintPipeline": Tiny(
        SD3 | {"transformer": {"in_channels": 16, "out_channels": 16}, "vae": {"latent_channels": 16}}, SHORT
    ),
    "StableDiffusion3PAGImg2ImgPipeline": Tiny(SD3 | {"pag_applied_layers": "blocks.1"}, SHORT),
    "StableDiffusionAdapterPipeline": Tiny(SD | {"unet": ATTENTIVE_FIRST}),
    "StableDiffusionControlNetImg2ImgPipeline": Tiny(SD),
    "StableDiffusionControlNetInpaintPipeline": Tiny(SD),
    "StableDiffusionControlNetPAGInpaintPipeline": Tiny(SD | IN_BLOCK),
    "StableDiffusionControlNetPAGPipeline": Tiny(SD | IN_BLOCK),
    "StableDiffusionControlNetPipeline": Tiny(SD),
    "StableDiffusionControlNetXSPipeline": Tiny(SD | {"unet": CONTROLLED_WITHIN}),
    "StableDiffusionImageVariationPipeline": Tiny(SD | SEEN),
    "StableDiffusionImg2ImgPipeline": Tiny(SD),
    "StableDiffusionInpaintPipeline": Tiny(SD | {"unet": MASKED_UNET, "vae": Other("AutoencoderKL")}),
    "StableDiffusionInpaintPipelineLegacy": Tiny(SD | {"feature_extractor": ...}),
    "StableDiffusionInstructPix2PixPipeline": Tiny(SD | {"unet": {"in_channels": 8}}),
    "StableDiffusionLatentUpscalePipeline": Tiny(
        {"unet": {"in_channels": 8, "out_channels": 5, "time_cond_proj_dim": 128 + 32}}
    ),
    "StableDiffusionPAGImg2ImgPipeline": Tiny(SD | IN_BLOCK),
    "StableDiffusionPAGInpaintPipeline": Tiny(SD | IN_BLOCK | {"unet": MASKED_UNET}),
    "StableDiffusionUpscalePipeline": Tiny(
        {
            "unet": {"in_channels": 7, "num_class_embeds": 1000},
            "vae": {
                "down_block_types": ("DownEncoderBlock2D",) * 3,
                "up_block_types": ("UpDecoderBlock2D",) * 3,
                "block_out_channels": (8, 8, 8),
            },
        }
    ),
    "StableDiffusionXLAdapterPipeline": Tiny({"unet": SDXL_UNET | ATTENTIVE_FIRST}),
    "StableDiffusionXLControlNetImg2ImgPipeline": Tiny(XL_CONTROL),
    "StableDiffusionXLControlNetInpaintPipeline": Tiny(XL_CONTROL),
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": Tiny(XL_CONTROL | IN_BLOCK),
    "StableDiffusionXLControlNetPAGPipeline": Tiny(XL_CONTROL | IN_BLOCK),
    "StableDiffusionXLControlNetXSPipeline": Tiny(
        {
            "unet": SDXL_UNET | CONTROLLED_WITHIN,
            "controlnet": {"transformer_layers_per_block": (1, 2), "cross_attention_dim": 64},
        }
    ),
    "StableDiffusionXLControlNetPipeline": Tiny(XL_CONTROL),
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": Tiny(XL_CONTROL, {"control_mode": 0}),
    "StableDiffusionXLControlNetUnionInpaintPipeline": Tiny(XL_CONTROL, {"control_mode": 0}),
    "StableDiffusionXLControlNetUnionPipeline": Tiny(XL_CONTROL, {"control_mode": 0}),
    "StableDiffusionXLImg2ImgPipeline": Tiny(SDXL),
    "StableDiffusionXLInpaintPipeline": Tiny(SDXL),
    "StableDiffusionXLInstructPix2PixPipeline": Tiny({"unet": SDXL_UNET | {"in_channels": 8}}),
    "StableDiffusionXLPAGImg2ImgPipeline": Tiny(SDXL | IN_BLOCK),
    "StableDiffusionXLPAGInpaintPipeline": Tiny(SDXL | IN_BLOCK),
    "StableUnCLIPImg2ImgPipeline": Tiny(
        SEEN
        | {
            "image_noising_scheduler": Other("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
            "unet": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 64},
        }
    ),
    "StableVideoDiffusionPipeline": Tiny(SEEN | {"image_encoder": large_seeing}),
    "VersatileDiffusionDualGuidedPipeline": Tiny({"image_encoder": ...}),
    "VersatileDiffusionImageVariationPipeline": Tiny({"image_encoder": ...}),
    "WanImageToVideoPipeline": Tiny(SEEN_BY_WAN | WAN_SEEING, SHORT),
    "ZImageControlNetInpaintPipeline": Tiny({"controlnet": {"control_in_dim": 9}}, SHORT),
    "ZImageControlNetPipeline": Tiny({"controlnet": {"control_in_dim": 4}}, SHORT),
    "ZImageImg2ImgPipeline": Tiny({}, SHORT),
    "ZImageInpaintPipeline": Tiny({}, SHORT),
}
"""Keyed by class name."""
