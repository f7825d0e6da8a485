"""Chroma."""

from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from . import text_encoders, tokenizers
from .autoencoders import image_autoencoder
from .family import Family
from .weights import ready, seeded


def _transformer() -> ChromaTransformer2DModel:
    return ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )


def build_chroma() -> ChromaPipeline:
    """Chroma with one double and one single block."""
    tokenizer = tokenizers.t5_tokenizer()
    with seeded():
        pipeline = ChromaPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=image_autoencoder(latent_channels=4, shift_factor=0.1),
            text_encoder=text_encoders.t5(tokenizer),
            tokenizer=tokenizer,
            transformer=_transformer(),
        )
        return ready(pipeline)


CHROMA = Family(
    name="chroma",
    build=build_chroma,
    call={"width": 64, "height": 64, "num_inference_steps": 3, "guidance_scale": 4.0, "max_sequence_length": 64},
    kind="image",
    note="as flux, but guidance as two calls in a row, and an attention mask with a batch dimension",
)
