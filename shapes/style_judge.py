"""Reads the style of a picture from its pixels alone: how far the shape is an outline, how far it has stripes.

Gaps narrower than a stripe's are closed and holes are filled; what results is a silhouette, and every pixel of it has
a depth, its distance from the edge. An outline is where the rim has the shape's colour and the middle does not; stripes
are what the depth does not explain and what repeats along the diagonal with the stripes' period.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from .judge import Layers, Picture, Reading, Verdict, as_pixels, named, recognise, take_apart
from .scene import PICTURE
from .styles import STRIPE_PERIOD, STROKE

CLOSED = 3.5
"""Radius, in pixels of 128, of the disc that gaps are closed with."""

AMPLITUDE = 0.25
"""The amplitude of stripes in a large shape: a gap of a fifth of a period has 0.19, half a period 0.32."""

STRONG = 0.67
"""Share of the shape's colour from which a pixel belongs to the silhouette as much as any other."""

OUTLINE_CLEAR = 0.4
"""Score above which an outline is meant, and not a rim that stripes leave."""

RIM = (2, 3)
"""First and last pixel from the edge that belong to the rim; the very first is a mixture."""

WEAK = 0.2
"""The rim is taken for as strong as the weakest part of it, of this share."""

MIDDLE = 6
"""Depth from which pixels belong to the middle, in a shape that is so deep."""


@dataclass(frozen=True, slots=True)
class StyleVerdict:
    """The scores `outlined` and `striped`, each in [0, 1], and the attributes; both scores are 0 without a shape.

    As drawn by `render_styled` a style scores about 1; with both, the outline about a third, as stripes fill it.
    """

    outlined: float
    striped: float
    shows: Verdict


def judge_style(picture: Picture) -> StyleVerdict:
    """Reads one picture, as `judge` does, in any style. Raises ValueError for anything that is not an RGB picture."""
    found = take_apart(as_pixels(picture))
    if not isinstance(found, Layers):
        return StyleVerdict(0.0, 0.0, named(Reading(None, None, found, 0.0)))
    whole = silhouette(found.mask)
    depth = depths(whole > 0.5)
    outlined, striped = _outlined(found.mask, depth), _striped(found.mask, depth)
    if outlined > OUTLINE_CLEAR:  # what stands outside the shape is the outer half of the outline
        whole = -_widen(-whole, STROKE / 2)
    return StyleVerdict(outlined, striped, named(recognise(replace(found, mask=whole))))


def silhouette(mask: Tensor) -> Tensor:
    """The mask [H, W], faint strokes made strong, with gaps closed and holes filled."""
    return _close(_fill(_close((mask / STRONG).clamp(max=1.0))))


def _close(mask: Tensor) -> Tensor:
    return -_widen(-_widen(mask, CLOSED), CLOSED)


def _widen(mask: Tensor, radius: float) -> Tensor:
    """The largest value within `radius` pixels of each."""
    reach = math.floor(radius)
    height, width = mask.shape
    padded = functional.pad(mask[None, None], (reach,) * 4, mode="replicate")[0, 0]
    steps = range(2 * reach + 1)
    near = [(y, x) for y in steps for x in steps if math.hypot(y - reach, x - reach) <= radius]
    return torch.stack([padded[y : y + height, x : x + width] for y, x in near]).amax(dim=0)


def _fill(mask: Tensor) -> Tensor:
    """Raise each pixel to the value that seven of eight rays from it meet; one ray may escape through a gap."""
    met = torch.stack([_farthest(mask, y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)])
    return torch.maximum(mask, met.sort(dim=0).values[1])


def _farthest(mask: Tensor, down: int, right: int) -> Tensor:
    """The largest value that lies in one direction from each pixel of a square mask, by doubling the distance."""
    side, step = len(mask), 1
    while step < side:
        padded = functional.pad(mask[None, None], (step,) * 4)[0, 0]
        top, left = step + down * step, step + right * step
        mask = torch.maximum(mask, padded[top : top + side, left : left + side])
        step *= 2
    return mask


def _lowest_neighbour(values: Tensor) -> Tensor:
    """The smallest of each pixel's four neighbours."""
    above_below = functional.pad(values[None, None], (0, 0, 1, 1), mode="replicate")[0, 0]
    beside = functional.pad(values[None, None], (1, 1, 0, 0), mode="replicate")[0, 0]
    return torch.stack((above_below[:-2], above_below[2:], beside[:, :-2], beside[:, 2:])).amin(dim=0)


def depths(inside: Tensor) -> Tensor:
    """Each pixel's octagonal distance, in pixels, from the outside of `inside` [H, W] bool; 0 outside."""
    left = inside.float()
    depth = left.clone()
    for step in range(PICTURE // 2):
        square = step % 2 == 1
        left = (
            -functional.max_pool2d(-left[None], 3, 1, 1)[0] if square else torch.minimum(left, _lowest_neighbour(left))
        )
        if not left.any():
            break
        depth += left
    return depth


def _middle(depth: Tensor) -> Tensor:
    return depth >= min(MIDDLE, 0.75 * float(depth.max()))


def _rim(depth: Tensor) -> Tensor:
    return (depth >= RIM[0]) & (depth <= RIM[1])


def _outlined(mask: Tensor, depth: Tensor) -> float:
    """How much more of the colour the rim has, even where it is weak, than the middle; stripes break the rim."""
    if float(depth.max()) < RIM[1]:
        return 0.0
    difference = float(mask[_rim(depth)].quantile(WEAK) - mask[_middle(depth)].mean())
    return min(max(difference, 0.0), 1.0)


def _striped(mask: Tensor, depth: Tensor) -> float:
    """The amplitude of the stripes' fundamental, in parts of `AMPLITUDE`, in the middle or all over."""
    if float(depth.max()) < RIM[1]:
        return 0.0
    level = torch.zeros_like(mask)
    for step in range(int(depth.max()) + 1):
        level[depth == step] = mask[depth == step].mean()
    steps = torch.arange(PICTURE) + 0.5
    angle = 2 * math.pi / STRIPE_PERIOD * (steps[None, :] + steps[:, None])
    wave = (mask - level) * torch.exp(1j * angle)
    amplitudes = [float(wave[part].mean().abs()) for part in (depth > 0, _middle(depth))]
    return min(max(amplitudes) / AMPLITUDE, 1.0)
