"""Stage two: encodes the training clips once, so that the flow stage never runs the autoencoder."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from ...train.run import Report, Run, load, save
from ..clip import Clip, every_clip
from ..render import clip_masks, render_clips, shown
from .vae import SPATIAL, TEMPORAL

BATCH = 16
FAINTEST = 0.1
"""Smallest standard deviation of a channel, as a part of the largest; whitening would blow up what carries nothing."""


@dataclass(frozen=True, slots=True)
class Latents:
    """Encoded clips: `clean` [N, 16, 5, 8, 8] float16, whitened; `shown` [N, 5, 8, 8] bool, where the shape is.

    `mean` and `deviation` [16] are what whitening took away from each channel.
    """

    clips: tuple[Clip, ...]
    clean: Tensor
    shown: Tensor
    mean: Tensor
    deviation: Tensor


def encode_clips(run: Run, vae: AutoencoderKLWan, each: int) -> Latents:
    """Every clip of the world, `each` times jittered, through the autoencoder; kept in `latents.pt` of the run."""
    stored = load(run.checkpoint("latents"), torch.device("cpu"))
    if stored is not None:
        clips = tuple(Clip(*words) for words in stored["clips"])
        return Latents(clips, stored["clean"], stored["shown"], stored["mean"], stored["deviation"])
    latents = encode(run, vae.eval(), every_clip() * each)
    state = {
        "clips": [astuple(clip) for clip in latents.clips],
        "clean": latents.clean,
        "shown": latents.shown,
        "mean": latents.mean,
        "deviation": latents.deviation,
    }
    save(run.checkpoint("latents"), state)
    return latents


def encode(run: Run, vae: AutoencoderKLWan, clips: tuple[Clip, ...]) -> Latents:
    """`clips`, jittered, through the autoencoder."""
    encoded: list[Tensor] = []
    covered: list[Tensor] = []
    report = Report("latents", 0, -(-len(clips) // BATCH))
    for step in report.steps():
        part = clips[step * BATCH : (step + 1) * BATCH]
        frames = render_clips(part, run.generator("latents", step)).transpose(1, 2) * 2 - 1
        encoded.append(_means(vae, frames.to(run.device)).cpu())
        covered.append(shown(clip_masks(part, run.generator("latents", step)), SPATIAL, TEMPORAL))
        report.update(step)
    raw = torch.cat(encoded)
    mean, deviation = raw.mean(dim=(0, 2, 3, 4)), raw.std(dim=(0, 2, 3, 4))
    deviation = deviation.clamp(min=FAINTEST * float(deviation.max()))
    clean = (raw - mean[:, None, None, None]) / deviation[:, None, None, None]
    return Latents(clips, clean.half(), torch.cat(covered), mean, deviation)


@torch.no_grad()
def _means(vae: AutoencoderKLWan, frames: Tensor) -> Tensor:
    """Clips [B, 3, 17, 64, 64] in [-1, 1] to the mean of their latents, [B, 16, 5, 8, 8] float32."""
    mean: Tensor = vae.encode(frames).latent_dist.mean
    return mean.float()
