"""FLUX.1."""

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from . import text_encoders, tokenizers
from .autoencoders import image_autoencoder
from .family import Family
from .weights import ready, seeded


def _transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def build_flux() -> FluxPipeline:
    """A guidance-distilled FLUX.1 with one double and one single block."""
    clip_tokenizer, t5_tokenizer = tokenizers.clip_tokenizer(), tokenizers.t5_tokenizer()
    with seeded():
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=image_autoencoder(latent_channels=4, shift_factor=0.1),
            text_encoder=text_encoders.clip(clip_tokenizer),
            tokenizer=clip_tokenizer,
            text_encoder_2=text_encoders.t5(t5_tokenizer),
            tokenizer_2=t5_tokenizer,
            transformer=_transformer(),
        )
        return ready(pipeline)


FLUX = Family(
    name="flux",
    build=build_flux,
    call={"width": 64, "height": 64, "num_inference_steps": 3, "guidance_scale": 3.5, "max_sequence_length": 64},
    kind="image",
    note="distilled guidance: one call a step; img_ids and txt_ids have no batch dimension",
)
