"""The judge of clips reads what was drawn, through the damage that clips suffer, and says no to what is wrong."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from safelight.shapes.judge import Picture
from safelight.shapes.motion import Clip, judge_clip, render_clips, sample_clips
from safelight.shapes.motion.clip import DIRECTIONS, FRAMES
from safelight.shapes.motion.render import masks, paint, paths
from safelight.shapes.scene import SHAPES
from safelight.shapes.templates import blur

COUNT = 24
CLIPS = sample_clips(COUNT, torch.Generator().manual_seed(21))
STAR = Clip("yellow", "star", "right", "blue")


@pytest.fixture(scope="module")
def drawn() -> Tensor:
    """One jittered clip for each of `CLIPS`, [COUNT, FRAMES, 3, 64, 64]."""
    return render_clips(CLIPS, torch.Generator().manual_seed(22))


@pytest.fixture(scope="module")
def star() -> Tensor:
    """A star moving right, [FRAMES, 3, 64, 64]."""
    return render_clips([STAR])[0]


def image(frame: Tensor) -> Image.Image:
    return Image.fromarray((frame.movedim(0, -1) * 255).round().byte().numpy())


def compressed(frame: Tensor, quality: int) -> Image.Image:
    file = io.BytesIO()
    image(frame).save(file, "JPEG", quality=quality)
    return Image.open(file)


def misread(damaged: Iterable[Sequence[Picture] | Tensor]) -> list[tuple[Clip, object]]:
    verdicts = [(clip, judge_clip(frames)) for clip, frames in zip(CLIPS, damaged, strict=True)]
    return [(clip, verdict) for clip, verdict in verdicts if not verdict.matches(clip)]


def test_clean_clips_are_not_misread(drawn: Tensor) -> None:
    assert {clip.direction for clip in CLIPS} == set(DIRECTIONS)
    assert {clip.shape for clip in CLIPS} == set(SHAPES)
    assert misread(drawn) == []


def test_noise_is_not_taken_for_a_shape_or_for_motion(drawn: Tensor) -> None:
    noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(1)) * 0.05
    assert misread((drawn + noise).clamp(0, 1)) == []


def test_blur_does_not_turn_one_shape_into_another(drawn: Tensor) -> None:
    blurred = blur(drawn.flatten(0, 2)[:, None], 1.5)[:, 0].reshape(drawn.shape)
    assert misread(blurred) == []


def test_jpeg_does_not_turn_one_attribute_into_another(drawn: Tensor) -> None:
    assert misread([compressed(frame, 40) for frame in frames] for frames in drawn) == []


def test_the_kinds_of_frames_are_not_read_differently(star: Tensor) -> None:
    images = [image(frame) for frame in star]
    stacked = np.stack([np.asarray(frame) for frame in images])
    floats = stacked.astype(np.float32) / 255
    tensor = torch.from_numpy(floats).movedim(-1, 1)
    assert judge_clip(images) == judge_clip(stacked) == judge_clip(floats) == judge_clip(tensor)


@pytest.mark.parametrize("frames", [9, 33])
def test_more_or_fewer_frames_of_the_same_way_are_not_misread(frames: int) -> None:
    covered = masks([STAR.shape], paths([STAR], frames=frames), torch.tensor([26.0]))
    colours = torch.tensor([[0.98, 0.90, 0.16]]), torch.tensor([[0.14, 0.30, 0.86]])
    assert judge_clip(paint(covered, *colours)[0]).matches(STAR)


def test_a_reversed_clip_is_not_given_its_direction(star: Tensor) -> None:
    verdict = judge_clip(star.flip(0))
    assert (verdict.shape, verdict.direction) == ("star", "left")
    assert not verdict.matches(STAR)


def _late(star: Tensor) -> Tensor:
    return torch.cat([star[:1].expand(6, -1, -1, -1), star[6:]])


def _jumping(star: Tensor) -> Tensor:
    return torch.cat([star[:1].expand(8, -1, -1, -1), star[-1:].expand(9, -1, -1, -1)])


def _diagonal(star: Tensor) -> Tensor:
    return torch.stack([frame.roll(2 * (time - FRAMES // 2), dims=1) for time, frame in enumerate(star)])


NO_STRAIGHT_WAY = {
    "still": lambda star: star[8:9].expand(FRAMES, -1, -1, -1),
    "shuffled": lambda star: star[torch.randperm(FRAMES, generator=torch.Generator().manual_seed(0))],
    "back and forth": lambda star: torch.cat([star[::2], star[1::2].flip(0)]),
    "late": _late,
    "jumping": _jumping,
    "slow": lambda star: star[6:11].repeat_interleave(4, dim=0)[:FRAMES],
    "diagonal": _diagonal,
}


@pytest.mark.parametrize("name", NO_STRAIGHT_WAY)
def test_a_shape_that_keeps_to_no_straight_way_has_no_direction(name: str, star: Tensor) -> None:
    verdict = judge_clip(NO_STRAIGHT_WAY[name](star))
    assert (verdict.colour, verdict.shape, verdict.background) == ("yellow", "star", "blue")
    assert verdict.direction is None
    assert not verdict.clear


def test_what_changes_on_the_way_is_not_named(star: Tensor) -> None:
    other = render_clips([Clip("red", "circle", "right", "white")])[0]
    verdict = judge_clip(torch.cat([star[:9], other[9:]]))
    assert (verdict.colour, verdict.shape, verdict.background) == (None, None, None)
    assert verdict.direction == "right"


def test_an_empty_clip_is_not_guessed() -> None:
    verdict = judge_clip(torch.full((FRAMES, 3, 64, 64), 0.97))
    assert (verdict.colour, verdict.shape, verdict.direction, verdict.background) == (None, None, None, "white")


@pytest.mark.parametrize(
    "other",
    [
        Clip("red", "star", "right", "blue"),
        Clip("yellow", "heart", "right", "blue"),
        Clip("yellow", "star", "up", "blue"),
        Clip("yellow", "star", "right", "black"),
    ],
)
def test_a_wrong_attribute_does_not_match(other: Clip, star: Tensor) -> None:
    verdict = judge_clip(star)
    assert verdict.matches(STAR)
    assert sum(verdict.right(other).values()) == 3
    assert not verdict.matches(other)


def test_anything_but_a_clip_is_refused(star: Tensor) -> None:
    with pytest.raises(ValueError, match="two or more, got 1"):
        judge_clip(star[:1])
    with pytest.raises(ValueError, match="expected an RGB picture"):
        judge_clip(torch.zeros(FRAMES, 1, 64, 64))
