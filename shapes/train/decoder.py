"""Between the first two stages: sharpens the decoder on the scenes themselves, small ones above all.

The encoder stays as it is, so latents that were encoded before keep their meaning.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ..render import coverage, place, render
from ..scene import SIZES, Scene, sample_scenes
from .descent import descend
from .run import Run

LEARNING_RATE = 1e-3
BATCH = 12
LATENT_NOISE = 0.12
"""Standard deviation of what is added to latents, whose own is about 1.4: the flow model's latents are not exact."""

SHAPE_WEIGHT = 6.0
"""How much more a pixel near the shape counts than one of the background."""

CHECKPOINT_EVERY = 100


def refine(run: Run, vae: AutoencoderKL, steps: int) -> AutoencoderKL:
    """Trains, or resumes, the decoder alone; its latest state is `decoder.pt` under the run's folder."""
    rate, every = LEARNING_RATE, CHECKPOINT_EVERY
    descend(run, "decoder", vae.decoder, steps, lambda step: _loss(run, vae, step), rate=rate, every=every)
    return vae.eval()


def _loss(run: Run, vae: AutoencoderKL, step: int) -> tuple[Tensor, Tensor]:
    """The weighted error of one batch, and the plain mean absolute error."""
    generator = run.generator("decoder", step)
    scenes = _scenes(generator)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    pictures = render(scenes, torch.Generator().manual_seed(seed)).to(run.device) * 2 - 1
    placement = place(scenes, torch.Generator().manual_seed(seed))
    near = torch.nn.functional.max_pool2d(coverage([scene.shape for scene in scenes], placement), 7, 1, 3)
    with torch.autocast(run.device.type, torch.bfloat16):
        with torch.no_grad():
            mean = vae.encode(pictures).latent_dist.mean
        noise = torch.randn(mean.shape, generator=generator).to(run.device)
        decoded = vae.decode(mean + LATENT_NOISE * noise).sample
    error = decoded.float() - pictures
    weight = 1.0 + (SHAPE_WEIGHT - 1.0) * near[:, None].to(run.device)
    return (weight * (error.abs() + error.square())).mean(), error.detach().abs().mean()


def _scenes(generator: torch.Generator) -> list[Scene]:
    """Random scenes, every second one made small."""
    smallest = min(SIZES, key=lambda size: SIZES[size])
    scenes = sample_scenes(BATCH, generator)
    return [
        Scene(scene.colour, scene.shape, smallest if i % 2 else scene.size, scene.position, scene.background)
        for i, scene in enumerate(scenes)
    ]
