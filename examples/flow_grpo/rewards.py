"""What is asked for in training and in the examination, and how good a picture of it is."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch

from safelight.shapes import Scene, judge
from safelight.shapes.scene import sample_scenes

HELD_OUT = 200
"""Scenes that no training ever asks for."""


def held_out() -> list[Scene]:
    return sample_scenes(HELD_OUT, torch.Generator().manual_seed(0))


def training_scenes(count: int, generator: torch.Generator) -> list[Scene]:
    """``count`` random scenes, none of them held out."""
    forbidden = {astuple(scene) for scene in held_out()}
    drawn = sample_scenes(count + HELD_OUT, generator)
    return [scene for scene in drawn if astuple(scene) not in forbidden][:count]


@dataclass(frozen=True, slots=True)
class Marks:
    """What the judge says of a picture: the share of its five attributes that are right, and whether all are.

    ``reward`` in [0, 1] adds how clearly the shape can be told (IoU), which tells pictures of the same verdict apart.
    """

    score: float
    all_right: bool
    reward: float


def mark(picture: torch.Tensor, scene: Scene) -> Marks:
    """Of a picture [3, H, W] in [0, 1] that was to show ``scene``."""
    verdict = judge(picture)
    right = verdict.right(scene).values()
    score = sum(right) / len(right)
    return Marks(score, all(right), 0.5 * score + 0.5 * verdict.score)
