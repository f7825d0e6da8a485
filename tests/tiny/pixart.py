"""PixArt-Sigma."""

from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

from . import text_encoders, tokenizers
from .autoencoders import image_autoencoder
from .family import Family
from .weights import ready, seeded


def _transformer() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=32,
        out_channels=8,
        use_additional_conditions=False,
    )


def build_pixart() -> PixArtSigmaPipeline:
    """PixArt-Sigma with a multistep DPM solver."""
    tokenizer = tokenizers.t5_tokenizer()
    with seeded():
        pipeline = PixArtSigmaPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoders.t5(tokenizer),
            vae=image_autoencoder(latent_channels=4),
            transformer=_transformer(),
            scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
        )
        return ready(pipeline)


PIXART = Family(
    name="pixart",
    build=build_pixart,
    call={
        "width": 64,
        "height": 64,
        "num_inference_steps": 3,
        "guidance_scale": 4.5,
        "max_sequence_length": 64,
        "use_resolution_binning": False,
        "clean_caption": False,
    },
    kind="image",
    note="as sd15, on a transformer; added_cond_kwargs of None values; resolution binning has to be off",
)
