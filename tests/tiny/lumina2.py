"""Lumina Image 2.0."""

from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

from . import language_models, tokenizers
from .autoencoders import image_autoencoder
from .family import Family
from .weights import ready, seeded


def _transformer() -> Lumina2Transformer2DModel:
    return Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(300, 64, 64),
        cap_feat_dim=32,
    )


def build_lumina2() -> Lumina2Pipeline:
    """Lumina Image 2.0 with a Gemma 2 text encoder."""
    tokenizer = tokenizers.gemma_tokenizer()
    with seeded():
        pipeline = Lumina2Pipeline(
            transformer=_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=image_autoencoder(latent_channels=4, shift_factor=0.1),
            text_encoder=language_models.gemma2(tokenizer),
            tokenizer=tokenizer,
        )
        return ready(pipeline)


LUMINA2 = Family(
    name="lumina2",
    build=build_lumina2,
    call={"width": 64, "height": 64, "num_inference_steps": 3, "guidance_scale": 4.0, "max_sequence_length": 128},
    kind="image",
    note="guidance as two calls in a row; prompts of different lengths as a mask that the model unpads by",
)
