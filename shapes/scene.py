"""Scenes of the shapes world: a coloured shape in one of three sizes, at one of five places, on a plain background.

Lengths are in pixels of a picture of `PICTURE` x `PICTURE`; the renderer scales them to other resolutions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

PICTURE = 128
"""Side, in pixels, of the picture in which sizes and positions are given."""

COLOURS: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {
        "red": (0.86, 0.13, 0.13),
        "orange": (0.98, 0.53, 0.08),
        "yellow": (0.98, 0.90, 0.16),
        "green": (0.13, 0.63, 0.24),
        "blue": (0.14, 0.30, 0.86),
        "purple": (0.55, 0.18, 0.72),
        "white": (0.97, 0.97, 0.97),
        "black": (0.04, 0.04, 0.04),
    }
)
"""Colour name to RGB in [0, 1]."""

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "heart")

SIZES: Mapping[str, float] = MappingProxyType({"small": 12.0, "medium": 20.0, "large": 29.0})
"""Size name to nominal radius in pixels."""

POSITIONS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "center": (64.0, 64.0),
        "top left": (36.0, 36.0),
        "top right": (92.0, 36.0),
        "bottom left": (36.0, 92.0),
        "bottom right": (92.0, 92.0),
    }
)
"""Position name to the centre of the shape, (x, y) in pixels from the top left corner."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture of the world, in words. Raises ValueError for a word outside the vocabularies."""

    colour: str
    shape: str
    size: str
    position: str
    background: str

    def __post_init__(self) -> None:
        vocabularies = (COLOURS, SHAPES, SIZES, POSITIONS, COLOURS)
        for name, allowed in zip(self.__slots__, vocabularies, strict=True):
            word = getattr(self, name)
            if word not in allowed:
                raise ValueError(f"{name} is {word!r}, expected one of {', '.join(allowed)}")
        if self.colour == self.background:
            raise ValueError(f"a {self.colour} shape cannot be seen on a {self.background} background; change one")


def sample_scenes(count: int, generator: torch.Generator) -> list[Scene]:
    """`count` scenes, uniform over every combination in which shape and background differ in colour."""
    colours = tuple(COLOURS)
    draws = [
        torch.randint(high, (count,), generator=generator).tolist()
        for high in (len(colours), len(SHAPES), len(SIZES), len(POSITIONS), len(colours) - 1)
    ]
    return [_scene(*draw) for draw in zip(*draws, strict=True)]


def _scene(colour: int, shape: int, size: int, position: int, other: int) -> Scene:
    """The scene with these places in the vocabularies; `other` counts the colours that are not `colour`."""
    colours = tuple(COLOURS)
    background = (colour + 1 + other) % len(colours)
    return Scene(colours[colour], SHAPES[shape], tuple(SIZES)[size], tuple(POSITIONS)[position], colours[background])
