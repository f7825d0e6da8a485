"""Z-Image."""

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from . import language_models, tokenizers
from .autoencoders import image_autoencoder
from .family import Family
from .weights import ready, seeded


def _transformer() -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=96,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=32,
        axes_dims=[8, 8, 8],
        axes_lens=[256, 32, 32],
    )


def build_zimage() -> ZImagePipeline:
    """Z-Image with a Qwen3 text encoder."""
    tokenizer = tokenizers.qwen2_tokenizer()
    with seeded():
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=image_autoencoder(latent_channels=4, shift_factor=0.1),
            text_encoder=language_models.qwen3(tokenizer),
            tokenizer=tokenizer,
            transformer=_transformer(),
        )
        return ready(pipeline)


ZIMAGE = Family(
    name="zimage",
    build=build_zimage,
    call={"width": 64, "height": 64, "num_inference_steps": 3, "guidance_scale": 3.0, "max_sequence_length": 64},
    kind="image",
    note="lists of tensors, one a row, of different lengths; guidance as one call with 2 B rows",
)
