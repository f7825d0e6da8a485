"""Reads a picture of the shapes world from its pixels alone: colour, shape, size, position, background.

The background is the palette colour of the frame, the shape's colour that of the pixels farthest from it. Every pixel
is then a mixture of the two; the mixture, cut out and scaled to one area, is compared with drawn shapes by IoU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from .scene import COLOURS, PICTURE, POSITIONS, SIZES, Scene
from .templates import FRAME, FRAME_SPAN, Template, blur, templates

Picture = Tensor | NDArray[np.uint8] | NDArray[np.float32] | Image.Image
"""A float tensor [3, H, W] in [0, 1], an array [H, W, 3] of bytes or of floats in [0, 1], or an image of any mode."""

CLEAR_SCORE = 0.72
"""IoU from which a picture counts as showing a shape. Clean pictures reach 0.95; other shapes stay below 0.9."""

FRAME_WIDTH = 4
"""Pixels along the border that show the background."""

COLOUR_TOLERANCE = 0.24
"""Largest distance in RGB at which a colour still has a name. The closest two in the palette are 0.36 apart."""

POSITION_TOLERANCE = 12.0
"""Largest offset along an axis, in pixels of 128, at which a place still has a name."""

NOISE = 0.025
"""Median deviation of a pixel from its surroundings that calls for more smoothing; Gaussian noise of 0.05 has 0.028."""

SMALLEST_AREA = 60.0
"""Square pixels of 128 x 128 below which there is no shape; the smallest drawn one has about 190."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The attributes of a picture, None where unreadable. `score` is the IoU with the best template, in [0, 1]."""

    colour: str | None
    shape: str | None
    size: str | None
    position: str | None
    background: str | None
    score: float

    @property
    def clear(self) -> bool:
        """True if all five attributes were read."""
        return None not in (self.colour, self.shape, self.size, self.position, self.background)

    def right(self, scene: Scene) -> Mapping[str, bool]:
        """Compare each attribute with `scene`, by name."""
        return {field.name: getattr(self, field.name) == getattr(scene, field.name) for field in fields(scene)}

    def matches(self, scene: Scene) -> bool:
        """True if all five attributes equal those of `scene`."""
        return all(self.right(scene).values())


@dataclass(frozen=True, slots=True)
class Reading:
    """The measurements of a picture before size and place get names; None or NaN where unreadable.

    Radius and centre are in pixels of a picture of 128 x 128; `score` is as in `Verdict`.
    """

    colour: str | None
    shape: str | None
    background: str | None
    score: float
    radius: float = math.nan
    x: float = math.nan
    y: float = math.nan


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers of a picture: the background's name, both colours [3], and the share of the shape's colour per pixel.

    `mask` is [128, 128] in [0, 1]; `stray` counts pixels that are not a mixture of the two.
    """

    background: str
    ground: Tensor
    colour: Tensor
    mask: Tensor
    stray: float


@dataclass(frozen=True, slots=True)
class _Cutout:
    """A shape cut from its picture. `mask` [FRAME, FRAME]; centroid and root of the area in pixels of 128."""

    mask: Tensor
    stray: float
    x: float
    y: float
    side: float


def judge(picture: Picture) -> Verdict:
    """Reads one picture, square and of any resolution. Raises ValueError for anything that is not an RGB picture."""
    return named(read(picture))


def named(seen: Reading) -> Verdict:
    """The verdict of a reading: size and place get names."""
    if seen.shape is None:
        return Verdict(seen.colour, None, None, None, seen.background, seen.score)
    size, position = _size(seen.radius), _position(seen.x, seen.y)
    return Verdict(seen.colour, seen.shape, size, position, seen.background, seen.score)


def read(picture: Picture) -> Reading:
    """As `judge`, but with the shape's place and size in pixels."""
    found = take_apart(_smooth(as_pixels(picture)))
    return recognise(found) if isinstance(found, Layers) else Reading(None, None, found, 0.0)


def take_apart(pixels: Tensor) -> Layers | str | None:
    """The layers of a picture [3, 128, 128]; without a shape the background's name, or None if that has none either."""
    background = _background(pixels)
    if background is None:
        return None
    name, ground = background
    colour = _colour(pixels, ground)
    return name if colour is None else _layers(pixels, name, ground, colour)


def recognise(layers: Layers) -> Reading:
    """The reading of the template that matches the mask best."""
    cutout = _cut_out(layers)
    if cutout is None:
        return Reading(None, None, layers.background, 0.0)
    template, score = _best(cutout)
    colour = _name(layers.colour)
    if score < CLEAR_SCORE or colour in (None, layers.background):
        return Reading(colour, None, layers.background, score)
    radius = template.radius * cutout.side
    x, y = cutout.x - template.offset_x * radius, cutout.y - template.offset_y * radius
    return Reading(colour, template.shape, layers.background, score, radius, x, y)


def as_pixels(picture: Picture) -> Tensor:
    """Any picture as [3, 128, 128] float32 in [0, 1]."""
    if isinstance(picture, Image.Image):
        picture = np.asarray(picture.convert("RGB"))
    if isinstance(picture, np.ndarray):
        whole = 255 if picture.dtype == np.uint8 else 1
        picture = torch.from_numpy(picture.copy()).movedim(-1, 0).float() / whole
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise ValueError(f"expected an RGB picture, [3, H, W] as a tensor, got {tuple(picture.shape)}")
    pixels = picture.detach().float().cpu()
    if pixels.shape[1:] == (PICTURE, PICTURE):
        return pixels
    sized = functional.interpolate(pixels[None], (PICTURE, PICTURE), mode="bilinear", antialias=True)
    return sized[0]


def _smooth(pixels: Tensor) -> Tensor:
    """The picture without its noise, [3, 128, 128]: blurred a little, or more where most pixels differ from that."""
    smooth = blur(pixels[:, None], 0.8)[:, 0]
    noisy = float((pixels - smooth).abs().median()) > NOISE
    return blur(pixels[:, None], 1.6)[:, 0] if noisy else smooth


def _palette() -> Tensor:
    return torch.tensor(list(COLOURS.values()))


def _name(colour: Tensor) -> str | None:
    """The palette's name for an RGB colour [3], if it has one."""
    distance, index = torch.linalg.vector_norm(_palette() - colour, dim=1).min(dim=0)
    return list(COLOURS)[int(index)] if float(distance) < COLOUR_TOLERANCE else None


def _background(pixels: Tensor) -> tuple[str, Tensor] | None:
    """The name of the frame's commonest palette colour and that colour as the frame shows it, [3]."""
    inner = slice(FRAME_WIDTH, -FRAME_WIDTH)
    framed = torch.ones(PICTURE, PICTURE, dtype=torch.bool)
    framed[inner, inner] = False
    frame = pixels[:, framed].T
    nearest = torch.cdist(frame, _palette()).argmin(dim=1)
    label = int(nearest.mode().values)
    members = frame[nearest == label]
    colour = members.mean(dim=0)
    name = _name(colour)
    if name is None or len(members) < 0.6 * len(frame):
        return None
    return name, colour


def _colour(pixels: Tensor, background: Tensor) -> Tensor | None:
    """The colour [3] of the pixels farthest from the background, which mixtures at the edges never are."""
    contrast = torch.linalg.vector_norm(pixels - background[:, None, None], dim=0)
    strongest = float(contrast.flatten().topk(40).values[-1])
    if strongest < COLOUR_TOLERANCE:
        return None
    return pixels[:, contrast >= 0.85 * strongest].mean(dim=1)


def _layers(pixels: Tensor, background: str, ground: Tensor, colour: Tensor) -> Layers:
    """Every pixel as a mixture of the two colours."""
    axis = colour - ground
    mixture = torch.einsum("chw,c->hw", pixels - ground[:, None, None], axis) / axis.dot(axis)
    mask = ((mixture - 0.15) / 0.7).clamp(0.0, 1.0)
    explained = ground[:, None, None] + mixture.clamp(0.0, 1.0) * axis[:, None, None]
    unexplained = torch.linalg.vector_norm(pixels - explained, dim=0) / torch.linalg.vector_norm(axis)
    return Layers(background, ground, colour, mask, float((unexplained > 0.4).sum()))


def _cut_out(layers: Layers) -> _Cutout | None:
    """The mask around its centroid, resampled so that every shape has the same area."""
    mask = layers.mask
    area = float(mask.sum())
    if area < SMALLEST_AREA:
        return None
    steps = torch.arange(PICTURE) + 0.5
    x, y = float((mask.sum(dim=0) * steps).sum()) / area, float((mask.sum(dim=1) * steps).sum()) / area
    side = area**0.5
    return _Cutout(_resample(mask, x, y, side), layers.stray / area, x, y, side)


def _resample(mask: Tensor, x: float, y: float, side: float) -> Tensor:
    """A window of `FRAME_SPAN` sides around (x, y) as [FRAME, FRAME]; outside the picture there is nothing."""
    half = FRAME_SPAN / 2 * side
    offsets = (torch.arange(FRAME) + 0.5) / FRAME * 2 - 1
    columns = (x + offsets * half) / PICTURE * 2 - 1
    rows = (y + offsets * half) / PICTURE * 2 - 1
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
    return functional.grid_sample(mask[None, None], grid[None], mode="bilinear", align_corners=False)[0, 0]


def _best(cutout: _Cutout) -> tuple[Template, float]:
    """The template of highest IoU. Mask outside the window and pixels of a third colour count against all of them."""
    bank = templates()
    frame_area = (FRAME / FRAME_SPAN) ** 2
    missed = max(0.0, frame_area - float(cutout.mask.sum())) + cutout.stray * frame_area
    masks = torch.stack([template.mask for template in bank])
    shared = torch.minimum(masks, cutout.mask).sum(dim=(1, 2))
    either = torch.maximum(masks, cutout.mask).sum(dim=(1, 2)) + missed
    score, index = (shared / either).max(dim=0)
    return bank[int(index)], float(score)


def _size(radius: float) -> str | None:
    name, nominal = min(SIZES.items(), key=lambda item: abs(np.log(radius / item[1])))
    return name if 0.72 < radius / nominal < 1.3 else None


def _position(x: float, y: float) -> str | None:
    def offset(place: tuple[float, float]) -> float:
        return max(abs(place[0] - x), abs(place[1] - y))

    name, place = min(POSITIONS.items(), key=lambda item: offset(item[1]))
    return name if offset(place) <= POSITION_TOLERANCE else None
