"""AnimateDiff."""

from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

from . import text_encoders, tokenizers
from .autoencoders import image_autoencoder
from .family import Family
from .stable_diffusion import unet
from .weights import ready, seeded


def _motion_adapter() -> MotionAdapter:
    return MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
        motion_max_seq_length=16,
    )


def build_animatediff() -> AnimateDiffPipeline:
    """AnimateDiff: the UNet of Stable Diffusion 1.5 with motion modules."""
    tokenizer = tokenizers.clip_tokenizer()
    with seeded():
        pipeline = AnimateDiffPipeline(
            vae=image_autoencoder(latent_channels=4, quant_conv=True),
            text_encoder=text_encoders.clip(tokenizer),
            tokenizer=tokenizer,
            unet=unet(cross_attention_dim=32),
            motion_adapter=_motion_adapter(),
            scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
        )
        return ready(pipeline)


ANIMATEDIFF = Family(
    name="animatediff",
    build=build_animatediff,
    call={"width": 32, "height": 32, "num_frames": 4, "num_inference_steps": 3, "guidance_scale": 5.0},
    kind="video",
    note="troublesome: latents have 2 B rows, the prompt has 2 B times frames rows in the same call",
)
