"""A look at a model in training: a sheet of clips, the judge's counts, and clips as a GIF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from numpy.typing import NDArray
from PIL import Image

from ...train.look import counts, sheet
from ..captions import caption
from ..clip import FPS, FRAMES, SIDE, Clip, sample_clips
from ..judge import judge_clip
from .text import TEXT_TOKENS

SEED = 20_000
"""The clips and the noise of every look, so that looks can be compared."""

STEPS = 20
"""Denoising steps of a look; the pipeline's default of 50 would take longer than it tells."""

STRIP = (0, 4, 8, 12, 16)
"""Frames of a clip that a sheet shows."""


def draw(
    pipeline: WanPipeline, prompts: list[str], noise: torch.Generator | list[torch.Generator], **options: float
) -> NDArray[np.float32]:
    """Clips of `prompts`, [B, FRAMES, SIDE, SIDE, 3] in [0, 1]; `options` go to the pipeline, noise is the CPU's."""
    clips: NDArray[np.float32] = pipeline(
        prompt=prompts,
        height=SIDE,
        width=SIDE,
        num_frames=FRAMES,
        generator=noise,
        output_type="np",
        **{"max_sequence_length": TEXT_TOKENS, **options},
    ).frames
    return clips


def look(pipeline: WanPipeline, path: Path, count: int = 24) -> str:
    """Draws `count` clips onto a sheet at `path`; returns the judge's counts in one line."""
    clips = sample_clips(count, torch.Generator().manual_seed(SEED))
    prompts = [caption(clip) for clip in clips]
    frames = draw(pipeline, prompts, torch.Generator().manual_seed(SEED), num_inference_steps=STEPS)
    path.parent.mkdir(parents=True, exist_ok=True)
    strips(frames).save(path)
    return scores(frames, clips)


def scores(frames: NDArray[np.float32], clips: Sequence[Clip]) -> str:
    """How many clips show each attribute, and all: "colour 24, shape 20, ... all 19 of 24"."""
    return counts([judge_clip(shown).right(clip) for shown, clip in zip(frames, clips, strict=True)])


def strips(frames: NDArray[np.float32], columns: int = 3) -> Image.Image:
    """Clips [B, F, H, W, 3] in [0, 1] as a few frames each, side by side, `columns` clips to a row."""
    framed = np.pad(frames[:, list(STRIP)], ((0, 0), (0, 0), (0, 2), (0, 2), (0, 0)), constant_values=0.5)
    return sheet(framed.reshape(-1, *framed.shape[2:]), columns * len(STRIP))


def animate(frames: NDArray[np.float32], path: Path, columns: int = 6, scale: int = 2) -> None:
    """Writes clips [B, F, H, W, 3] in [0, 1] as one GIF that repeats, `columns` clips to a row, pixels `scale` wide."""
    framed = np.pad(frames, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=0.5)
    tiled = [sheet(moment, columns) for moment in framed.swapaxes(0, 1)]
    images = [image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) for image in tiled]
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=1000 // FPS, loop=0)
