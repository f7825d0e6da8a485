"""The small image autoencoder that most image families share."""

from diffusers import AutoencoderKL


def image_autoencoder(
    latent_channels: int, scaling_factor: float = 0.5, shift_factor: float | None = None, quant_conv: bool = False
) -> AutoencoderKL:
    """A convolutional autoencoder that reduces height and width by 8, without attention."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
        mid_block_add_attention=False,
    )
