"""Stage one: a video autoencoder, 16 channels at an eighth of the side and a quarter of the frames.

Most steps see small crops of arbitrary motion, full of edges and a fraction of the cost; the last ones see whole clips
of the world, drifting as they will do for the checkpoint.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from ...scene import PICTURE, SHAPES
from ...train.descent import descend
from ...train.run import Run
from ...train.vae import random_colours
from ..clip import FRAMES, SIDE, sample_clips
from ..render import masks, paint, render_clips

CROP, CROP_FRAMES, CROP_BATCH = 32, 9, 16
WHOLE_BATCH = 3
WHOLE_CLIPS_FROM = 0.75
"""Part of the run after which whole clips replace crops."""

KL_WEIGHT = 5e-4
LEARNING_RATE = 2e-3
CHECKPOINT_EVERY = 200
CHANNELS = 16
SPATIAL, TEMPORAL = 8, 4
"""Pixels along a side, and frames after the first, to one latent."""


def new_autoencoder(width: int = 32) -> AutoencoderKLWan:
    """An untrained autoencoder: [B, 3, F, H, W] in [-1, 1] to [B, 16, 1 + (F-1)/4, H/8, W/8] and back.

    Pixels are folded two by two into channels first, as Wan 2.2 does; at full resolution it would take twice as long.
    """
    return AutoencoderKLWan(
        base_dim=width,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=SPATIAL,
        scale_factor_temporal=TEMPORAL,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )


def random_motion(count: int, frames: int, side: int, generator: torch.Generator) -> Tensor:
    """Windows on two shapes of random colours and radii, each on a straight way of its own: [B, 3, F, side, side].

    Values are in [-1, 1], a pixel is one of a clip's. Wider than the world of clips on purpose: the autoencoder should
    also carry styles that are fine-tuned later.
    """
    painted = random_colours(count, generator)
    for _ in range(2):
        mask = _random_mask(count, frames, side, generator)
        painted = paint(mask, random_colours(count, generator), painted)
    return painted.transpose(1, 2) * 2 - 1


def _random_mask(count: int, frames: int, side: int, generator: torch.Generator) -> Tensor:
    """One shape each, radius 7 to 16 of a clip's pixels, at most 3 of them a frame: [B, F, side, side] in [0, 1]."""
    names = [SHAPES[i] for i in torch.randint(len(SHAPES), (count,), generator=generator).tolist()]
    unit = PICTURE / side
    middle, velocity = torch.rand(2, count, 1, 2, generator=generator)
    travelled = (torch.arange(frames) - frames / 2)[None, :, None] * (velocity * 6 - 3)
    radius = (7 + 9 * torch.rand(count, generator=generator)) * unit
    return masks(names, middle * PICTURE + travelled * unit, radius, side)


def reconstruction_loss(vae: AutoencoderKLWan, clips: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """L1 plus squared error, with the KL term; and the mean absolute error alone. Clips [B, 3, F, H, W] in [-1, 1].

    `noise` has the latents' shape and draws them, so that a run repeats whatever the device's own generator does.
    """
    with torch.autocast(clips.device.type, torch.bfloat16):
        posterior = vae.encode(clips).latent_dist
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    error = decoded.float() - clips
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
    absolute = error.abs().mean()
    return absolute + error.square().mean() + KL_WEIGHT * kl, absolute.detach()


def train(run: Run, steps: int, width: int = 32) -> AutoencoderKLWan:
    """Trains, or resumes, the autoencoder; its latest state is `vae.pt` under the run's folder."""
    torch.manual_seed(run.seed)
    vae = new_autoencoder(width).to(run.device)

    def loss(step: int) -> tuple[Tensor, Tensor]:
        generator = run.generator("vae", step)
        clips = _batch(generator, whole=step >= WHOLE_CLIPS_FROM * steps)
        count, _, frames, height, width = clips.shape
        latent = (count, CHANNELS, 1 + (frames - 1) // TEMPORAL, height // SPATIAL, width // SPATIAL)
        noise = torch.randn(latent, generator=generator)
        return reconstruction_loss(vae, clips.to(run.device), noise.to(run.device))

    descend(run, "vae", vae, steps, loss, rate=LEARNING_RATE, every=CHECKPOINT_EVERY)
    return vae.eval()


def _batch(generator: torch.Generator, whole: bool) -> Tensor:
    """Crops of random motion or whole clips, one of them random: [B, 3, F, H, W] in [-1, 1]."""
    if not whole:
        return random_motion(CROP_BATCH, CROP_FRAMES, CROP, generator)
    clips = render_clips(sample_clips(WHOLE_BATCH - 1, generator), generator).transpose(1, 2) * 2 - 1
    return torch.cat([clips, random_motion(1, FRAMES, SIDE, generator)])
