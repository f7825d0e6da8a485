"""Draws clips with the renderer of pictures; the centre moves by the same distance in every frame."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..render import Placement, compose, coverage
from ..scene import COLOURS, PICTURE
from .clip import DIRECTIONS, FRAMES, PATH, RADIUS, SIDE, Clip

JITTER_CENTRE = 1.0
"""Largest shift of a whole path along each axis, in pixels of a `PICTURE`-wide frame."""


def paths(clips: Sequence[Clip], generator: torch.Generator | None = None, frames: int = FRAMES) -> Tensor:
    """The centre in each frame, [B, frames, 2] as (x, y) in pixels of 128; jittered if there is a generator."""
    signs = torch.tensor([DIRECTIONS[clip.direction] for clip in clips], dtype=torch.float32)
    reach = (PATH[1] - PATH[0]) / 2
    travelled = torch.linspace(-reach, reach, frames)
    centres = PICTURE / 2 + signs[:, None, :] * travelled[None, :, None]
    if generator is not None:
        shift = torch.rand(len(clips), 1, 2, generator=generator) * 2 - 1
        centres = centres + shift * JITTER_CENTRE
    return centres


def masks(shapes: Sequence[str], centres: Tensor, radius: Tensor, side: int = SIDE) -> Tensor:
    """The coverage of moving shapes: centres [B, F, 2] and radius [B], in pixels of 128, to [B, F, side, side]."""
    count, frames, _ = centres.shape
    x, y = centres.flatten(0, 1).unbind(dim=1)
    names = [name for name in shapes for _ in range(frames)]
    covered = coverage(names, Placement(x, y, radius.repeat_interleave(frames)), side)
    return covered.reshape(count, frames, side, side)


def clip_masks(clips: Sequence[Clip], generator: torch.Generator | None = None) -> Tensor:
    """The coverage of each clip's shape, [B, FRAMES, SIDE, SIDE] in [0, 1]."""
    return masks([clip.shape for clip in clips], paths(clips, generator), torch.full((len(clips),), RADIUS))


def render_clips(clips: Sequence[Clip], generator: torch.Generator | None = None) -> Tensor:
    """`clips` as [B, FRAMES, 3, SIDE, SIDE] float32 in [0, 1]. With a generator, the paths are jittered."""
    colour = torch.tensor([COLOURS[clip.colour] for clip in clips])
    background = torch.tensor([COLOURS[clip.background] for clip in clips])
    return paint(clip_masks(clips, generator), colour, background)


def paint(mask: Tensor, colour: Tensor, background: Tensor) -> Tensor:
    """Lays a colour over every frame: mask [B, F, H, W]; colour [B, 3]; background [B, 3] or [B, F, 3, H, W]."""
    count, frames = mask.shape[:2]
    ground = background.flatten(0, 1) if background.ndim == 5 else background.repeat_interleave(frames, dim=0)
    painted = compose(mask.flatten(0, 1), colour.repeat_interleave(frames, dim=0), ground)
    return painted.reshape(count, frames, *painted.shape[1:])


def shown(mask: Tensor, stride: int, frames_each: int) -> Tensor:
    """Where an autoencoder's latents show the shape: mask [B, F, H, W] to [B, 1 + (F-1)/frames_each, H/s, W/s] bool.

    The first frame has a latent of its own, every later one shows `frames_each` frames.
    """
    pooled = functional.max_pool2d(mask, stride)
    count, frames, height, width = pooled.shape
    later = pooled[:, 1:].reshape(count, (frames - 1) // frames_each, frames_each, height, width).amax(dim=2)
    return torch.cat([pooled[:, :1], later], dim=1) > 0
