"""Stage one: an autoencoder that keeps the crisp edges of flat-coloured shapes in 16 channels at an eighth of the side.

Most steps see 64-pixel crops full of edges, four times cheaper than whole pictures; the last ones see whole pictures,
whose group-norm statistics are those the checkpoint will meet.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ..render import Placement, compose, coverage
from ..scene import COLOURS, PICTURE, SHAPES
from .descent import descend
from .run import Run

CROP = 64
WHOLE_PICTURES_FROM = 0.8
"""Part of the run after which whole pictures replace crops."""

KL_WEIGHT = 5e-4
LEARNING_RATE = 2e-3
BATCH = 16
CHECKPOINT_EVERY = 250


def new_autoencoder(widths: tuple[int, ...] = (16, 32, 64, 64)) -> AutoencoderKL:
    """An untrained autoencoder: [B, 3, H, W] in [-1, 1] to [B, 16, H/8, W/8] and back."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=PICTURE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def random_pictures(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Two shapes of random colours, radii and places on a plain ground: [B, 3, size, size] in [0, 1].

    Wider than the world of scenes on purpose: the autoencoder should also carry styles that are fine-tuned later.
    """
    pictures = random_colours(count, generator)
    for _ in range(2):
        mask = _random_mask(count, size, generator)
        pictures = compose(mask, random_colours(count, generator), pictures)
    return pictures


def _random_mask(count: int, size: int, generator: torch.Generator) -> Tensor:
    """One shape each, radius 9 to 32 pixels, centre anywhere in the picture: [B, size, size] in [0, 1]."""
    names = [SHAPES[i] for i in torch.randint(len(SHAPES), (count,), generator=generator).tolist()]
    x, y, radius = torch.rand(3, count, generator=generator)
    scale = PICTURE / size
    return coverage(names, Placement(x * PICTURE, y * PICTURE, (9 + 23 * radius) * scale), size)


def random_colours(count: int, generator: torch.Generator) -> Tensor:
    """Two thirds from the palette, one third anything: [B, 3] in [0, 1]."""
    palette = torch.tensor(list(COLOURS.values()))
    named = palette[torch.randint(len(palette), (count,), generator=generator)]
    anything = torch.rand(count, 3, generator=generator)
    return torch.where(torch.rand(count, 1, generator=generator) < 2 / 3, named, anything)


def reconstruction_loss(vae: AutoencoderKL, pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """L1 plus squared error, with the KL term; and the mean absolute error alone. Pictures [B, 3, H, W] in [-1, 1].

    `noise` [B, 16, H/8, W/8] draws the latent, so that a run repeats whatever the device's own generator does.
    """
    with torch.autocast(pictures.device.type, torch.bfloat16):
        posterior = vae.encode(pictures).latent_dist
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    error = decoded.float() - pictures
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
    absolute = error.abs().mean()
    return absolute + error.square().mean() + KL_WEIGHT * kl, absolute.detach()


def train(run: Run, steps: int, widths: tuple[int, ...] = (16, 32, 64, 64)) -> AutoencoderKL:
    """Trains, or resumes, the autoencoder; its latest state is `vae.pt` under the run's folder."""
    torch.manual_seed(run.seed)
    vae = new_autoencoder(widths).to(run.device)

    def loss(step: int) -> tuple[Tensor, Tensor]:
        size = PICTURE if step >= WHOLE_PICTURES_FROM * steps else CROP
        generator = run.generator("vae", step)
        pictures = random_pictures(BATCH, size, generator).to(run.device) * 2 - 1
        noise = torch.randn(BATCH, 16, size // 8, size // 8, generator=generator).to(run.device)
        return reconstruction_loss(vae, pictures, noise)

    descend(run, "vae", vae, steps, loss, rate=LEARNING_RATE, every=CHECKPOINT_EVERY)
    return vae.eval()
