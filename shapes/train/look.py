"""A look at a model in training: a sheet of samples and the judge's counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from numpy.typing import NDArray
from PIL import Image

from ..captions import caption
from ..judge import judge
from ..scene import PICTURE, Scene, sample_scenes
from .text import TEXT_TOKENS

SEED = 20_000
"""The scenes and the noise of every look, so that looks can be compared."""


def draw(pipeline: FluxPipeline, prompts: list[str], seed: int, steps: int = 28) -> NDArray[np.float32]:
    """Pictures of `prompts` with the pipeline's other defaults: [B, 128, 128, 3] in [0, 1]; noise from the CPU."""
    pictures: NDArray[np.float32] = pipeline(
        prompt=prompts,
        height=PICTURE,
        width=PICTURE,
        num_inference_steps=steps,
        max_sequence_length=TEXT_TOKENS,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    return pictures


def sheet(pictures: NDArray[np.float32], columns: int = 8) -> Image.Image:
    """Pictures [B, H, W, 3] in [0, 1] in rows of `columns`; the last row is filled with grey."""
    count, height, width, _ = pictures.shape
    rows = -(-count // columns)
    cells = np.full((rows * columns, height, width, 3), 0.5, dtype=np.float32)
    cells[:count] = pictures
    tiled = cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    return Image.fromarray((tiled * 255).round().astype(np.uint8))


def look(pipeline: FluxPipeline, path: Path, count: int = 24) -> str:
    """Draws `count` scenes onto a sheet at `path`; returns the judge's counts in one line."""
    scenes = sample_scenes(count, torch.Generator().manual_seed(SEED))
    pictures = draw(pipeline, [caption(scene) for scene in scenes], SEED)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(pictures).save(path)
    return scores(pictures, scenes)


def scores(pictures: NDArray[np.float32], scenes: list[Scene]) -> str:
    """How many pictures show each attribute, and all: "colour 24, shape 20, ... all 19 of 24"."""
    verdicts = [judge(picture) for picture in pictures]
    return counts([verdict.right(scene) for verdict, scene in zip(verdicts, scenes, strict=True)])


def counts(right: Sequence[Mapping[str, bool]]) -> str:
    """One line of how often each attribute is right, and all at once; `right` has a mapping for each judged thing."""
    parts = [f"{name} {sum(one[name] for one in right)}" for name in right[0]]
    return f"{', '.join(parts)}, all {sum(all(one.values()) for one in right)} of {len(right)}"
