"""Clips of the shapes world: a coloured shape that crosses a plain background in one of four directions.

Lengths are in pixels of a frame of `PICTURE` x `PICTURE`, as in `shapes.scene`; frames themselves are `SIDE` wide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ..scene import COLOURS, SHAPES

SIDE = 64
"""Side of a frame in its own pixels."""

FRAMES = 17
FPS = 8
"""Frames in a clip, and frames per second."""

RADIUS = 26.0
PATH = (36.0, 92.0)
"""The one radius, and the coordinates between which a centre travels; across its way it stays in the middle."""

DIRECTIONS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
)
"""Direction name to the sign of the motion, x to the right and y downwards."""


@dataclass(frozen=True, slots=True)
class Clip:
    """One clip of the world, in words. Raises ValueError for a word outside the vocabularies."""

    colour: str
    shape: str
    direction: str
    background: str

    def __post_init__(self) -> None:
        for name, allowed in zip(self.__slots__, (COLOURS, SHAPES, DIRECTIONS, COLOURS), strict=True):
            word = getattr(self, name)
            if word not in allowed:
                raise ValueError(f"{name} is {word!r}, expected one of {', '.join(allowed)}")
        if self.colour == self.background:
            raise ValueError(f"a {self.colour} shape cannot be seen on a {self.background} background; change one")


def every_clip() -> tuple[Clip, ...]:
    """Every combination in which shape and background differ in colour, 1,344 of them."""
    return tuple(
        Clip(colour, shape, direction, background)
        for colour in COLOURS
        for shape in SHAPES
        for direction in DIRECTIONS
        for background in COLOURS
        if background != colour
    )


def sample_clips(count: int, generator: torch.Generator) -> list[Clip]:
    """`count` clips, uniform over every combination."""
    clips = every_clip()
    return [clips[row] for row in torch.randint(len(clips), (count,), generator=generator).tolist()]
