"""Between the first two stages: the autoencoder goes on with the clips of the world alone, until outlines are sharp.

First all of it, then the decoder alone: that leaves latents as they are, so it can run while the flow stage does.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch.nn import functional

from ...scene import COLOURS
from ...train.descent import descend
from ...train.run import Run
from ..clip import Clip, sample_clips
from ..render import clip_masks, render_clips
from .vae import KL_WEIGHT

LEARNING_RATE = 1.5e-3
BATCH = 4
LATENT_NOISE = 0.15
"""Standard deviation of what is added to latents, whose own is about 2: the flow model's latents are not exact."""

SHAPE_WEIGHT = 4.0
"""How much more a pixel on or near the shape counts than one of the background."""

CONTRAST, MOST = 0.5, 4.0
"""Clips count in inverse proportion to their contrast, from this on and at most so much: all outlines matter alike."""

CHECKPOINT_EVERY = 100


def refine(run: Run, vae: AutoencoderKLWan, steps: int) -> AutoencoderKLWan:
    """Trains, or resumes, the autoencoder; its latest state is `refine.pt` under the run's folder."""
    _channels_last(vae)
    rate, every = LEARNING_RATE, CHECKPOINT_EVERY
    descend(run, "refine", vae, steps, lambda step: _loss(run, vae, step, "refine"), rate=rate, every=every)
    return vae.eval()


def sharpen(run: Run, vae: AutoencoderKLWan, steps: int) -> AutoencoderKLWan:
    """Trains, or resumes, the decoder alone; its latest state is `decoder.pt` under the run's folder."""
    rate, every = LEARNING_RATE, CHECKPOINT_EVERY
    vae.requires_grad_(False).decoder.requires_grad_(True)
    descend(run, "decoder", vae.decoder, steps, lambda step: _loss(run, vae, step, "decoder"), rate=rate, every=every)
    return vae.requires_grad_(True).eval()


def contrast_weights(clips: list[Clip]) -> Tensor:
    """The weight of each clip's error, [B]."""
    colour = torch.tensor([COLOURS[clip.colour] for clip in clips])
    background = torch.tensor([COLOURS[clip.background] for clip in clips])
    return (CONTRAST / (colour - background).abs().mean(dim=1)).clamp(1.0, MOST)


def _loss(run: Run, vae: AutoencoderKLWan, step: int, stage: str) -> tuple[Tensor, Tensor]:
    """The weighted error of one batch, and the plain mean absolute error."""
    generator = run.generator(stage, step)
    clips = sample_clips(BATCH, generator)
    if stage == "decoder":  # points of stars are lost first
        clips[0] = Clip(clips[0].colour, "star", clips[0].direction, clips[0].background)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    frames = render_clips(clips, torch.Generator().manual_seed(seed)).transpose(1, 2).to(run.device) * 2 - 1
    near = functional.max_pool2d(clip_masks(clips, torch.Generator().manual_seed(seed)), 5, 1, 2)
    with torch.autocast(run.device.type, torch.bfloat16):
        posterior = vae.encode(frames).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(run.device)
        decoded = vae.decode(posterior.mean + (posterior.std + LATENT_NOISE) * noise).sample
    error = decoded.float() - frames
    weight = (1.0 + (SHAPE_WEIGHT - 1.0) * near[:, None]) * contrast_weights(clips)[:, None, None, None, None]
    weighted = (weight.to(run.device) * (error.abs() + error.square())).mean()
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
    return weighted + KL_WEIGHT * kl, error.detach().abs().mean()


def _channels_last(module: nn.Module) -> None:
    """Convolutions on CPUs take less time with this order of their weights' memory."""
    for parameter in module.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
