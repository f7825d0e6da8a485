"""AuraFlow."""

from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

from . import text_encoders, tokenizers
from .autoencoders import image_autoencoder
from .family import Family
from .weights import ready, seeded


def _transformer() -> AuraFlowTransformer2DModel:
    return AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pos_embed_max_size=64,
    )


def build_auraflow() -> AuraFlowPipeline:
    """AuraFlow with one joint and one single block."""
    tokenizer = tokenizers.t5_tokenizer()
    with seeded():
        pipeline = AuraFlowPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoders.umt5(tokenizer),
            vae=image_autoencoder(latent_channels=4, quant_conv=True),
            transformer=_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        )
        return ready(pipeline)


AURAFLOW = Family(
    name="auraflow",
    build=build_auraflow,
    call={"width": 64, "height": 64, "num_inference_steps": 3, "guidance_scale": 3.5, "max_sequence_length": 64},
    kind="image",
    note="guidance as one call with 2 B rows",
)
