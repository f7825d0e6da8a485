"""Draws scenes in a style: the shape as an outline, or filled with stripes, or both.

Captions do not mention styles: an adapter makes a model draw in one. Strokes and gaps
are as fine as the embedded model's autoencoder can keep: it loses a stroke of 3 pixels, and stripes 6 pixels apart.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .render import Placement, covered, distances, paint, place
from .scene import PICTURE, Scene

STYLES = ("outlined", "striped")

STROKE = 4.0
"""Width of an outline, half of it outside the shape, in pixels of a `PICTURE`-wide picture."""

STRIPE_PERIOD = 16.0
"""From one stripe to the next along either axis, as they are diagonal; 11.3 pixels across."""

GAP = (1.0, 0.1)
"""Width of a gap across the stripes: so many pixels, and this part of the radius. Wider ones hide small shapes."""


def render_styled(
    scenes: Sequence[Scene],
    styles: Collection[str],
    generator: torch.Generator | None = None,
    size: int = PICTURE,
) -> Tensor:
    """As `render`, in all of `styles`; with none of them the same bytes. Raises ValueError for an unknown style."""
    unknown = set(styles) - set(STYLES)
    if unknown:
        raise ValueError(f"there is no style {', '.join(sorted(unknown))}; expected some of {', '.join(STYLES)}")
    placement = place(scenes, generator)
    distance = distances([scene.shape for scene in scenes], placement, size)
    mask = covered(distance)
    if "striped" in styles:
        mask = mask * _stripes(placement, size)
    if "outlined" in styles:
        half = STROKE / 2 * (size / PICTURE)
        outline = covered(distance.abs() - half)
        mask = torch.maximum(outline, mask) if "striped" in styles else outline
    return paint(scenes, mask)


def _stripes(placement: Placement, size: int) -> Tensor:
    """Diagonal stripes over whole pictures, upwards to the right, a gap through the centre: [B, size, size]."""
    scale = size / PICTURE
    steps = torch.arange(size) + 0.5
    across = (steps[None, :] + steps[:, None]) / math.sqrt(2)
    centre = (placement.x + placement.y)[:, None, None] * scale / math.sqrt(2)
    period = STRIPE_PERIOD * scale / math.sqrt(2)
    from_gap = ((across - centre) / period - torch.round((across - centre) / period)).abs() * period
    gap = (GAP[0] + GAP[1] * placement.radius)[:, None, None] * scale
    return 1.0 - covered(from_gap - gap / 2)
