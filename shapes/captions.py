"""Captions of scenes: full ones, and shorter ones that leave some attributes to the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .scene import COLOURS, POSITIONS, SHAPES, SIZES, Scene

PARTIAL_SHARE = 0.23
"""The fraction of training captions that omit attributes."""

EMPTY_SHARE = 0.07
"""The fraction of empty training captions, which give an empty negative prompt a meaning."""


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption, and whether it fixes the shape's place and size."""

    text: str
    places: bool


def caption(scene: Scene) -> str:
    """Everything in one sentence: "a small yellow star at the top left on a black background"."""
    return describe(scene, size=True, position=True, background=True)


def describe(scene: Scene, *, size: bool = False, position: bool = False, background: bool = False) -> str:
    """The shape and its colour, with the attributes that are requested: "a red circle on a white background"."""
    words = ["a", scene.size] if size else ["an" if scene.colour[0] in "aeiou" else "a"]
    words += [scene.colour, scene.shape]
    if position:
        words.append("in the center" if scene.position == "center" else f"at the {scene.position}")
    if background:
        article = "an" if scene.background[0] in "aeiou" else "a"
        words.append(f"on {article} {scene.background} background")
    return " ".join(words)


def sample_caption(scene: Scene, generator: torch.Generator) -> Caption:
    """A training caption: mostly full, sometimes partial, now and then empty."""
    draw, *parts = torch.rand(4, generator=generator).tolist()
    if draw < EMPTY_SHARE:
        return Caption("", places=False)
    if draw >= EMPTY_SHARE + PARTIAL_SHARE:
        return Caption(caption(scene), places=True)
    size, position, background = (part < 0.5 for part in parts)
    text = describe(scene, size=size, position=position, background=background)
    return Caption(text, places=size and position)


def vocabulary() -> tuple[str, ...]:
    """Every word a caption can contain, sorted."""
    names = " ".join((*COLOURS, *SHAPES, *SIZES, *POSITIONS))
    return tuple(sorted({*names.split(), "a", "an", "at", "in", "on", "the", "background"}))
