"""Reads a clip from its pixels alone: colour, shape, direction, background.

Each frame is read as a picture. A word holds for the clip if nearly every frame shows it; a direction has to be one
straight, steady way through them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from torch import Tensor

from ..judge import Picture, Reading, read
from .clip import DIRECTIONS, FRAMES, PATH, Clip

AGREEMENT = 0.8
"""Part of the frames that have to show a word."""

STRIDE = (PATH[1] - PATH[0]) / (FRAMES - 1)
"""The distance that a drawn shape travels between two frames, in pixels of 128."""

STRIDE_RANGE = (0.6, 1.5)
"""Slowest and fastest motion that has a direction, in units of `STRIDE`."""

DRIFT = 0.2
"""Largest motion across the direction, as a part of the motion along it."""

UNSTEADINESS = 6.0
"""Largest distance of a centre from the fitted way, in pixels of 128; four frames' stand before a start has 9."""


@dataclass(frozen=True, slots=True)
class ClipVerdict:
    """The attributes of a clip, None where unreadable. `score` is the frames' mean IoU with the best templates."""

    colour: str | None
    shape: str | None
    direction: str | None
    background: str | None
    score: float

    @property
    def clear(self) -> bool:
        """True if all four attributes were read."""
        return None not in (self.colour, self.shape, self.direction, self.background)

    def right(self, clip: Clip) -> Mapping[str, bool]:
        """Compare each attribute with `clip`, by name."""
        return {field.name: getattr(self, field.name) == getattr(clip, field.name) for field in fields(clip)}

    def matches(self, clip: Clip) -> bool:
        """True if all four attributes equal those of `clip`."""
        return all(self.right(clip).values())


def judge_clip(frames: Sequence[Picture] | Tensor) -> ClipVerdict:
    """Reads the frames of one clip: a sequence of pictures, a tensor [F, 3, H, W] or an array [F, H, W, 3].

    Raises ValueError for fewer than two frames and for anything that is not an RGB picture.
    """
    if len(frames) < 2:
        raise ValueError(f"expected the frames of a clip, two or more, got {len(frames)}")
    seen = [read(frame) for frame in frames]
    return ClipVerdict(
        colour=_agreed([frame.colour for frame in seen]),
        shape=_agreed([frame.shape for frame in seen]),
        direction=_direction(seen),
        background=_agreed([frame.background for frame in seen]),
        score=sum(frame.score for frame in seen) / len(seen),
    )


def _agreed(words: Sequence[str | None]) -> str | None:
    word, count = Counter(words).most_common(1)[0]
    return word if count >= AGREEMENT * len(words) else None


def _direction(seen: Sequence[Reading]) -> str | None:
    """The direction of a straight line fitted through the centres, if they follow it at a steady pace."""
    times = np.array([time for time, frame in enumerate(seen) if frame.shape is not None])
    if len(times) < max(2, AGREEMENT * len(seen)):
        return None
    centres = np.array([(seen[time].x, seen[time].y) for time in times])
    terms = np.stack([times, np.ones(len(times))], axis=1)
    way = np.linalg.lstsq(terms, centres, rcond=None)[0]
    if np.abs(centres - terms @ way).max() > UNSTEADINESS:
        return None
    travelled = way[0] * (len(seen) - 1) / (STRIDE * (FRAMES - 1))
    along = {name: float(travelled @ np.array(sign)) for name, sign in DIRECTIONS.items()}
    name = max(along, key=lambda direction: along[direction])
    across = float(np.abs(travelled).min())
    steady = STRIDE_RANGE[0] < along[name] < STRIDE_RANGE[1] and across < DRIFT * along[name]
    return name if steady else None
