"""Prompts of training and evaluation, and the rewards of pictures."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch

from safelight.shapes import Scene, judge
from safelight.shapes.scene import sample_scenes

HELD_OUT = 200
"""Held-out scenes, never used in training."""


def held_out() -> list[Scene]:
    return sample_scenes(HELD_OUT, torch.Generator().manual_seed(0))


def training_scenes(count: int, generator: torch.Generator) -> list[Scene]:
    """``count`` random scenes, none of them held out."""
    forbidden = {astuple(scene) for scene in held_out()}
    drawn = sample_scenes(count + HELD_OUT, generator)
    return [scene for scene in drawn if astuple(scene) not in forbidden][:count]


@dataclass(frozen=True, slots=True)
class Marks:
    """The judge's score of a picture: the fraction of its five attributes that are right, and whether all are.

    ``reward`` in [0, 1] adds how clear the shape is (IoU), which ranks pictures of the same verdict.
    """

    score: float
    all_right: bool
    reward: float


def mark(picture: torch.Tensor, scene: Scene) -> Marks:
    """The score of a picture [3, H, W] in [0, 1] for the prompt of ``scene``."""
    verdict = judge(picture)
    right = verdict.right(scene).values()
    score = sum(right) / len(right)
    return Marks(score, all(right), 0.5 * score + 0.5 * verdict.score)
