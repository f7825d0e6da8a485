"""Draws scenes as pictures: signed distance functions, anti-aliased, a whole batch at a time.

The distance functions follow Inigo Quilez, "2D distance functions" (iquilezles.org/articles/distfunctions2d).
They take points in units of the radius, x to the right and y downwards, and are negative inside the shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from .scene import COLOURS, PICTURE, POSITIONS, SHAPES, SIZES, Scene

JITTER_CENTRE = 1.0
"""Largest shift of a centre along each axis, in pixels of a `PICTURE`-wide picture."""

JITTER_RADIUS = 0.05
"""Largest relative change of a radius."""


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.95


def _square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.85, 0.85)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 1.0, 0.34), _box(x, y, 0.34, 1.0))


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    """Equilateral, pointing up, circumradius 1.15; the largest of three half-plane distances."""
    y = y - 0.18
    slanted = x.abs() * math.cos(math.pi / 6) - y * 0.5
    return torch.maximum(slanted, y) - 1.15 / 2


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points, outer radius 1.08; the plane is folded onto one half point (`sdStar5` in the source)."""
    outer, inner = 1.08, 0.46
    cosine, sine = math.cos(math.pi / 5), math.sin(math.pi / 5)
    x, y = x.abs(), -(y - 0.06)
    for fold in (cosine, -cosine):
        beyond = 2.0 * torch.clamp(fold * x - sine * y, min=0.0)
        x, y = x - beyond * fold, y + beyond * sine
    x, y = x.abs(), y - outer
    edge_x, edge_y = inner * sine, inner * cosine - 1.0
    along = torch.clamp((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2), 0.0, outer)
    return torch.hypot(x - edge_x * along, y - edge_y * along) * torch.sign(y * edge_x - x * edge_y)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """Point down, 2.1 wide (`sdHeart` in the source, whose heart is 1.207 wide and stands on the origin)."""
    scale = 1.74
    x, y = x.abs() / scale, 0.55 - y / scale
    lobe = torch.hypot(x - 0.25, y - 0.75) - math.sqrt(2.0) / 4
    half = 0.5 * torch.clamp(x + y, min=0.0)
    flank = torch.minimum(torch.hypot(x, y - 1.0), torch.hypot(x - half, y - half)) * torch.sign(x - y)
    return torch.where(x + y > 1.0, lobe, flank) * scale


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    across, down = x.abs() - half_width, y.abs() - half_height
    outside = torch.hypot(across.clamp(min=0.0), down.clamp(min=0.0))
    return outside + torch.maximum(across, down).clamp(max=0.0)


DISTANCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {"circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "cross": _cross, "heart": _heart}
)
"""Shape name to its signed distance function, in units of the radius."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where shapes stand: `x`, `y` and `radius`, each [B] float32, in pixels of a `PICTURE`-wide picture."""

    x: Tensor
    y: Tensor
    radius: Tensor


def place(scenes: Sequence[Scene], generator: torch.Generator | None = None) -> Placement:
    """The nominal placement of each scene, or a jittered one (uniform, see `JITTER_*`) drawn from `generator`."""
    centres = torch.tensor([POSITIONS[scene.position] for scene in scenes])
    radius = torch.tensor([SIZES[scene.size] for scene in scenes])
    if generator is not None:
        shift = torch.rand(len(scenes), 3, generator=generator) * 2 - 1
        centres = centres + shift[:, :2] * JITTER_CENTRE
        radius = radius * (1 + shift[:, 2] * JITTER_RADIUS)
    return Placement(centres[:, 0], centres[:, 1], radius)


def coverage(shapes: Sequence[str], placement: Placement, size: int = PICTURE) -> Tensor:
    """The coverage of each pixel by each shape: [B, size, size] float32 in [0, 1], on the placement's device."""
    return covered(distances(shapes, placement, size))


def covered(distance: Tensor) -> Tensor:
    """The coverage of a pixel by the region where the signed distance, in pixels, is negative.

    The edge is a ramp one pixel wide across the zero of the distance: anti-aliasing by a box filter.
    """
    return (0.5 - distance).clamp(0.0, 1.0)


def distances(shapes: Sequence[str], placement: Placement, size: int = PICTURE) -> Tensor:
    """Signed distance of each pixel from the edge of each shape: [B, size, size] float32, in pixels of `size`."""
    device = placement.x.device
    pixels = (torch.arange(size, device=device) + 0.5) * (PICTURE / size)
    result = torch.empty(len(shapes), size, size, device=device)
    for shape in SHAPES:
        rows = torch.tensor([i for i, name in enumerate(shapes) if name == shape], dtype=torch.long, device=device)
        if len(rows) == 0:
            continue
        radius = placement.radius[rows, None, None]
        x = (pixels[None, None, :] - placement.x[rows, None, None]) / radius
        y = (pixels[None, :, None] - placement.y[rows, None, None]) / radius
        result[rows] = DISTANCES[shape](x.expand(-1, size, size), y.expand(-1, size, size)) * radius * (size / PICTURE)
    return result


def compose(mask: Tensor, colour: Tensor, background: Tensor) -> Tensor:
    """Lays a colour over a background: mask [B, H, W]; colour [B, 3]; background [B, 3] or [B, 3, H, W]; RGB out."""
    ground = background if background.ndim == 4 else background[:, :, None, None]
    return ground + mask[:, None] * (colour[:, :, None, None] - ground)


def render(scenes: Sequence[Scene], generator: torch.Generator | None = None, size: int = PICTURE) -> Tensor:
    """Pictures of `scenes`: [B, 3, size, size] float32 in [0, 1]. With a generator, centre and radius are jittered."""
    return paint(scenes, coverage([scene.shape for scene in scenes], place(scenes, generator), size))


def paint(scenes: Sequence[Scene], mask: Tensor) -> Tensor:
    """Each scene's colour over its background, blended by `mask` [B, H, W]: [B, 3, H, W] in [0, 1]."""
    colour = torch.tensor([COLOURS[scene.colour] for scene in scenes])
    background = torch.tensor([COLOURS[scene.background] for scene in scenes])
    return compose(mask, colour, background)
