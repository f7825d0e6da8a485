"""Stable Diffusion 1.5 and XL: the UNet families."""

from typing import Any

from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from . import text_encoders, tokenizers
from .autoencoders import image_autoencoder
from .family import Family
from .weights import ready, seeded

NOISE_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def unet(**options: Any) -> UNet2DConditionModel:
    """A UNet with one plain and one cross-attention level; options as `UNet2DConditionModel` takes them."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=(2, 4),
        **options,
    )


def sd15_components() -> dict[str, Any]:
    """The components of Stable Diffusion 1.5, without a safety checker."""
    tokenizer = tokenizers.clip_tokenizer()
    return {
        "vae": image_autoencoder(latent_channels=4, quant_conv=True),
        "text_encoder": text_encoders.clip(tokenizer),
        "tokenizer": tokenizer,
        "unet": unet(cross_attention_dim=32),
        "scheduler": DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def build_sd15() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 with DDIM."""
    with seeded():
        return ready(StableDiffusionPipeline(**sd15_components()))


def build_sd15_pag() -> StableDiffusionPAGPipeline:
    """Stable Diffusion 1.5 with perturbed-attention guidance in the middle block."""
    with seeded():
        return ready(StableDiffusionPAGPipeline(**sd15_components(), pag_applied_layers=["mid"]))


def build_sdxl(second_width: int = 32) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL: text encoders of width 32 and ``second_width``, six sizes of 8 embedded dimensions each."""
    first, second = tokenizers.clip_tokenizer(), tokenizers.clip_tokenizer(pad_token="!")
    with seeded():
        pipeline = StableDiffusionXLPipeline(
            vae=image_autoencoder(latent_channels=4, quant_conv=True),
            text_encoder=text_encoders.clip(first),
            text_encoder_2=text_encoders.projected_clip(second, second_width),
            tokenizer=first,
            tokenizer_2=second,
            unet=unet(
                cross_attention_dim=32 + second_width,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                transformer_layers_per_block=(1, 2),
                projection_class_embeddings_input_dim=6 * 8 + second_width,
            ),
            scheduler=EulerDiscreteScheduler(**NOISE_SCHEDULE, timestep_spacing="leading"),
        )
        return ready(pipeline)


SD15 = Family(
    name="sd15",
    build=build_sd15,
    call={"width": 64, "height": 64, "num_inference_steps": 3, "guidance_scale": 5.0},
    kind="image",
    note="UNet; guidance as one call with 2 B rows; a timestep with no batch dimension",
)

SD15_PAG = Family(
    name="sd15_pag",
    build=build_sd15_pag,
    call={"width": 64, "height": 64, "num_inference_steps": 3, "guidance_scale": 5.0, "pag_scale": 3.0},
    kind="image",
    note="troublesome: swaps attention processors on the shared UNet during a call; 3 B rows",
)

SDXL = Family(
    name="sdxl",
    build=build_sdxl,
    call={"width": 64, "height": 64, "num_inference_steps": 3, "guidance_scale": 5.0},
    kind="image",
    note="as sd15, with added_cond_kwargs (a nested dict) and two text encoders",
)
