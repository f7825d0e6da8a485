"""Tiny forms of pipelines that need a text alone: what they need beyond the forms of their components' classes."""

from __future__ import annotations

from diffusers import AdaptiveProjectedMixGuidance, ClassifierFreeGuidance

from .changes import (
    AMUSED,
    HUNYUAN_DIT,
    KANDINSKY,
    KANDINSKY_2_2,
    KOLORS,
    LONG_CAT,
    ONE_TRANSFORMER,
    PIXEL_UNET,
    PLAIN_DPM,
    SD,
    SD3,
    SDXL,
    SDXL_UNET,
    SHORT,
    UNPACKED_SANA,
    Tiny,
)
from .encoders import ENCODERS, long_clip, qwen3_vl
from .parts import Other

TINY: dict[str, Tiny] = {
    "AllegroPipeline": Tiny({}, SHORT | {"clean_caption": False}),
    "AmusedPipeline": Tiny(AMUSED),
    "AnimateDiffPAGPipeline": Tiny({"pag_applied_layers": "mid"}),
    "AnimateDiffSDXLPipeline": Tiny({"unet": SDXL_UNET, "motion_adapter": {"use_motion_mid_block": False}}),
    "AnyFlowFARPipeline": Tiny({}, SHORT),
    "AnyFlowPipeline": Tiny({}, SHORT),
    "AuraFlowPipeline": Tiny({}, SHORT),
    "BriaFiboPipeline": Tiny({}, SHORT),
    "BriaFibo2Pipeline": Tiny({}, SHORT),
    "BriaPipeline": Tiny({"scheduler": {"use_dynamic_shifting": True}}, SHORT),
    "ChromaPipeline": Tiny({"scheduler": {"use_dynamic_shifting": True}}, SHORT),
    "CogVideoXPipeline": Tiny({"scheduler": Other("CogVideoXDDIMScheduler")}),
    "CogView3PlusPipeline": Tiny(),
    "CogView4Pipeline": Tiny({"scheduler": {"use_dynamic_shifting": True}}, SHORT),
    "EasyAnimatePipeline": Tiny({}, {"negative_prompt": "blurry"}),
    "Flux2Pipeline": Tiny({}, SHORT),
    "Flux2KleinPipeline": Tiny({"scheduler": {"use_dynamic_shifting": True}}, SHORT),
    "FluxPipeline": Tiny({}, SHORT),
    "HeliosPipeline": Tiny({"scheduler": {"stage_range": [0, 1], "stages": 1, "use_dynamic_shifting": True}}, SHORT),
    "HeliosPyramidPipeline": Tiny(
        {"scheduler": Other("HeliosScheduler", {"gamma": 0.3})}, SHORT | {"width": 64, "height": 64}
    ),
    "HiDreamImagePipeline": Tiny(
        {
            "text_encoder": long_clip,
            "text_encoder_2": long_clip,
            # it always draws 128 latent pixels a side
            "vae": {"block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2}
            | {"up_block_types": ("UpDecoderBlock2D",) * 2},
        }
    ),
    "HunyuanDiTPAGPipeline": Tiny(HUNYUAN_DIT | {"pag_applied_layers": "blocks.1"}, {"use_resolution_binning": False}),
    "HunyuanDiTPipeline": Tiny(HUNYUAN_DIT, {"use_resolution_binning": False}),
    "HunyuanImagePipeline": Tiny(
        {
            "guider": AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=0),
            "ocr_guider": AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1),
        }
    ),
    "HunyuanVideo15Pipeline": Tiny({"guider": ClassifierFreeGuidance(guidance_scale=3.0)}),
    "HunyuanVideoPipeline": Tiny({}, SHORT),
    "IFPipeline": Tiny(PIXEL_UNET),
    "Ideogram4Pipeline": Tiny(
        {"text_encoder": qwen3_vl("Qwen3VLModel", layers=36)}, {"guidance_scale": 4.0, "guidance_schedule": None}
    ),
    "KandinskyCombinedPipeline": Tiny(KANDINSKY),
    "KandinskyV22CombinedPipeline": Tiny(KANDINSKY_2_2),
    "Kandinsky3Pipeline": Tiny(),
    "KolorsPAGPipeline": Tiny(KOLORS | {"pag_applied_layers": "mid"}),
    "KolorsPipeline": Tiny(KOLORS),
    "Krea2Pipeline": Tiny({"text_encoder_select_layers": (0, 1, 2)}, SHORT),
    "LDMTextToImagePipeline": Tiny(
        {
            "vqvae": Other("AutoencoderKL"),
            "bert": lambda tokenizer: ENCODERS["CLIPTextModel"](tokenizer),
            "tokenizer": Other("CLIPTokenizer"),
            "unet": Other("UNet2DConditionModel"),
            "scheduler": Other("DDIMScheduler"),
        }
    ),
    "LTX2DFRPipeline": Tiny({"transformer": {"use_keyframes_abs_pos_embedding": True}}, SHORT),
    "LTX2Pipeline": Tiny({}, SHORT),
    "LTXPipeline": Tiny({"scheduler": {"use_dynamic_shifting": True}}, SHORT),
    "LatentConsistencyModelPipeline": Tiny(SD | {"unet": {"time_cond_proj_dim": 16}}),
    "LattePipeline": Tiny(),
    "LongCatImagePipeline": Tiny(LONG_CAT),
    "Lumina2Pipeline": Tiny({}, {"max_sequence_length": 128}),
    "LuminaPipeline": Tiny({}, {"max_sequence_length": 64, "clean_caption": False}),
    "MochiPipeline": Tiny({}, SHORT),
    "MotifVideoPipeline": Tiny(
        {"scheduler": Other("FlowMatchEulerDiscreteScheduler"), "guider": ClassifierFreeGuidance(guidance_scale=3.0)},
        SHORT,
    ),
    "NucleusMoEImagePipeline": Tiny({"text_encoder": qwen3_vl(layers=8)}),
    "OmniGenPipeline": Tiny({"scheduler": {"invert_sigmas": True, "num_train_timesteps": 1}}),
    "OvisImagePipeline": Tiny(),
    "PRXPixelPipeline": Tiny({"transformer": {"in_channels": 3}, "text_encoder": ENCODERS["Qwen3VLTextModel"]}),
    # transformers does not load a saved T5GemmaEncoder again, so Gemma 2 stands in for it
    "PRXPipeline": Tiny(
        {"vae": ..., "text_encoder": Other("Gemma2PreTrainedModel")}, {"use_resolution_binning": False}
    ),
    "PixArtAlphaPipeline": Tiny({"scheduler": PLAIN_DPM}, {"clean_caption": False}),
    "PixArtSigmaPAGPipeline": Tiny({"pag_applied_layers": "blocks.1"}, {"clean_caption": False}),
    "PixArtSigmaPipeline": Tiny({}, {"clean_caption": False}),
    "QwenImagePipeline": Tiny(
        {"scheduler": {"use_dynamic_shifting": True}}, SHORT | {"true_cfg_scale": 3.0, "negative_prompt": "blurry"}
    ),
    "SanaPAGPipeline": Tiny(UNPACKED_SANA | {"pag_applied_layers": "blocks.1"}, SHORT),
    "SanaPipeline": Tiny({}, SHORT | {"complex_human_instruction": None}),
    "SanaSprintPipeline": Tiny(
        {
            "scheduler": Other("SCMScheduler"),
            "transformer": {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
        },
        SHORT | {"num_inference_steps": 2},
    ),
    "SanaVideoPipeline": Tiny({"vae": Other("AutoencoderKLWan")}, SHORT),
    "SkyReelsV2DiffusionForcingPipeline": Tiny(
        {"text_encoder": Other("UMT5EncoderModel")}, SHORT | {"base_num_frames": 9, "ar_step": 0}
    ),
    "SkyReelsV2Pipeline": Tiny({"text_encoder": Other("UMT5EncoderModel")}, SHORT),
    "StableDiffusion3PAGPipeline": Tiny(SD3 | {"pag_applied_layers": "blocks.1"}, SHORT),
    "StableDiffusion3Pipeline": Tiny(SD3, SHORT),
    "StableDiffusionAttendAndExcitePipeline": Tiny(
        # it looks at attention among the pixels of a latent halved twice
        SD
        | {
            "unet": {
                "block_out_channels": (16, 16, 32),
                "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
                "attention_head_dim": 4,
            }
        },
        {"token_indices": [2, 3], "attn_res": [2, 2]},
    ),
    "StableDiffusionGLIGENPipeline": Tiny(
        SD | {"unet": {"attention_type": "gated", "use_linear_projection": True}},
        {"gligen_phrases": ["a circle"], "gligen_boxes": [[0.1, 0.2, 0.6, 0.7]]},
    ),
    "StableDiffusionModelEditingPipeline": Tiny(SD | {"scheduler": Other("DDIMScheduler")}),
    "StableDiffusionParadigmsPipeline": Tiny(SD | {"scheduler": Other("DDIMParallelScheduler")}),
    "StableDiffusionPAGPipeline": Tiny(SD | {"pag_applied_layers": "mid"}),
    "StableDiffusionPanoramaPipeline": Tiny(SD),
    "StableDiffusionSAGPipeline": Tiny(SD),
    "StableDiffusionXLPAGPipeline": Tiny(SDXL | {"pag_applied_layers": "mid"}),
    "StableDiffusionXLPipeline": Tiny(SDXL),
    "StableUnCLIPPipeline": Tiny(
        {
            "prior_scheduler": Other(
                "DDPMScheduler",
                {"prediction_type": "sample", "variance_type": "fixed_small_log", "beta_schedule": "squaredcos_cap_v2"},
            ),
            "image_noising_scheduler": Other("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
            "image_normalizer": Other("StableUnCLIPImageNormalizer", {"embedding_dim": 32}),
            "unet": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 64},
            "prior": {"embedding_dim": 32},
        }
    ),
    "TextToVideoZeroPipeline": Tiny({"safety_checker": ..., "feature_extractor": ...}, {"t0": 0, "t1": 1}),
    "TextToVideoZeroSDXLPipeline": Tiny(SDXL, {"t0": 0, "t1": 1}),
    "VersatileDiffusionTextToImagePipeline": Tiny({"text_unet": None}),
    "WanPipeline": Tiny(ONE_TRANSFORMER, SHORT),
    "WanVACEPipeline": Tiny(ONE_TRANSFORMER, SHORT),
    "ZImagePipeline": Tiny({}, SHORT),
}
"""Keyed by class name."""
