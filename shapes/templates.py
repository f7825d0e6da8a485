"""Drawn shapes for the judge to compare with: one area, one centroid, a few sizes and degrees of blur each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from .render import Placement, coverage
from .scene import PICTURE, SHAPES

FRAME = 48
"""Side of a template in its own pixels."""

FRAME_SPAN = 2.4
"""Side of a template in units of the root of the shape's area; a star is 1.7 wide."""

SCALES = (0.95, 1.0, 1.05)
BLURS = (0.6, 1.4, 2.8)
"""Standard deviations in the template's pixels; a small star blurred by 2 pixels of its picture has 2.7."""


@dataclass(frozen=True, slots=True)
class Template:
    """A shape in a frame, [FRAME, FRAME] in [0, 1].

    `radius` is in units of the root of the measured area; the centroid lies (`offset_x`, `offset_y`) radii from the
    centre that the shape was drawn at.
    """

    shape: str
    mask: Tensor
    radius: float
    offset_x: float
    offset_y: float


@cache
def templates() -> tuple[Template, ...]:
    """Every shape in every scale and blur."""
    return tuple(template for shape in SHAPES for scale in SCALES for template in _drawn(shape, scale))


def _drawn(shape: str, scale: float) -> list[Template]:
    area, offset_x, offset_y = _moments(shape)
    radius = scale / area**0.5
    unit = PICTURE / FRAME_SPAN
    x, y = PICTURE / 2 - offset_x * radius * unit, PICTURE / 2 - offset_y * radius * unit
    sharp = coverage([shape], _placement(x, y, radius * unit), FRAME)
    return [Template(shape, blur(sharp[None], sigma)[0, 0], radius, offset_x, offset_y) for sigma in BLURS]


def _moments(shape: str) -> tuple[float, float, float]:
    """Area and centroid (right, down) of a shape of radius 1 drawn at the origin."""
    radius = 40.0
    mask = coverage([shape], _placement(PICTURE / 2, PICTURE / 2, radius))[0]
    steps = torch.arange(PICTURE) + 0.5 - PICTURE / 2
    area = mask.sum()
    x, y = (mask.sum(dim=0) * steps).sum() / area, (mask.sum(dim=1) * steps).sum() / area
    return float(area) / radius**2, float(x) / radius, float(y) / radius


def _placement(x: float, y: float, radius: float) -> Placement:
    return Placement(torch.tensor([x]), torch.tensor([y]), torch.tensor([radius]))


def blur(pictures: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with replicated borders: [B, 1, H, W], `sigma` in pixels."""
    reach = max(1, round(2.5 * sigma))
    steps = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = functional.pad(pictures, (reach,) * 4, mode="replicate")
    return functional.conv2d(functional.conv2d(padded, kernel[None, None, :, None]), kernel[None, None, None, :])
