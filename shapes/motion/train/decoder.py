"""Between the first two stages: sharpens the decoder on the clips themselves.

The encoder stays as it is, so latents that were encoded before keep their meaning.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.nn import functional

from ...train.descent import descend
from ...train.run import Run
from ..clip import sample_clips
from ..render import clip_masks, render_clips

LEARNING_RATE = 1e-3
BATCH = 4
LATENT_NOISE = 0.15
"""Standard deviation of what is added to latents, whose own is about 2: the flow model's latents are not exact."""

SHAPE_WEIGHT = 4.0
"""How much more a pixel on or near the shape counts than one of the background."""

CHECKPOINT_EVERY = 100


def refine(run: Run, vae: AutoencoderKLWan, steps: int) -> AutoencoderKLWan:
    """Trains, or resumes, the decoder alone; its latest state is `decoder.pt` under the run's folder."""
    rate, every = LEARNING_RATE, CHECKPOINT_EVERY
    descend(run, "decoder", vae.decoder, steps, lambda step: _loss(run, vae, step), rate=rate, every=every)
    return vae.eval()


def _loss(run: Run, vae: AutoencoderKLWan, step: int) -> tuple[Tensor, Tensor]:
    """The weighted error of one batch, and the plain mean absolute error."""
    generator = run.generator("decoder", step)
    clips = sample_clips(BATCH, generator)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    frames = render_clips(clips, torch.Generator().manual_seed(seed)).transpose(1, 2).to(run.device) * 2 - 1
    near = functional.max_pool2d(clip_masks(clips, torch.Generator().manual_seed(seed)), 5, 1, 2)
    with torch.autocast(run.device.type, torch.bfloat16):
        with torch.no_grad():
            mean = vae.encode(frames).latent_dist.mean
        noise = torch.randn(mean.shape, generator=generator).to(run.device)
        decoded = vae.decode(mean + LATENT_NOISE * noise).sample
    error = decoded.float() - frames
    weight = 1.0 + (SHAPE_WEIGHT - 1.0) * near[:, None].to(run.device)
    return (weight * (error.abs() + error.square())).mean(), error.detach().abs().mean()
