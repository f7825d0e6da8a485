"""Captions of clips: full, without the background, and empty."""

from __future__ import annotations

import torch

from ..scene import COLOURS, SHAPES
from .clip import DIRECTIONS, Clip

EMPTY_SHARE = 0.10
"""The fraction of empty training captions: guidance compares each forward with one of an empty prompt."""

PARTIAL_SHARE = 0.18
"""The fraction of training captions without the background."""


def caption(clip: Clip, *, background: bool = True) -> str:
    """Everything in one sentence: "a red circle moving right on a white background"; or without the background."""
    text = f"{_article(clip.colour)} {clip.colour} {clip.shape} moving {clip.direction}"
    return f"{text} on {_article(clip.background)} {clip.background} background" if background else text


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def sample_caption(clip: Clip, generator: torch.Generator) -> str:
    """A training caption: mostly full, sometimes without the background, now and then empty."""
    draw = float(torch.rand((), generator=generator))
    if draw < EMPTY_SHARE:
        return ""
    return caption(clip, background=draw >= EMPTY_SHARE + PARTIAL_SHARE)


def vocabulary() -> tuple[str, ...]:
    """Every word a caption can contain, sorted."""
    return tuple(sorted({*COLOURS, *SHAPES, *DIRECTIONS, "a", "an", "moving", "on", "background"}))
