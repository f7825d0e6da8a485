"""Clips move as their captions say, by the same distance each frame, and never out of sight."""

from __future__ import annotations

import pytest
import torch

from safelight.shapes.motion import Clip, caption, every_clip, render_clips, sample_clips
from safelight.shapes.motion.captions import EMPTY_SHARE, PARTIAL_SHARE, sample_caption
from safelight.shapes.motion.clip import DIRECTIONS, FRAMES, PATH, SIDE
from safelight.shapes.motion.render import JITTER_CENTRE, clip_masks, paths, shown
from safelight.shapes.scene import COLOURS, PICTURE, SHAPES

CIRCLE = Clip("red", "circle", "right", "white")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parse(text: str) -> Clip:
    """Reads a full caption back, word by word."""
    article, colour, shape, moving, direction, on, _, background, ground = text.split()
    assert (article, moving, on, ground) == ("an" if colour == "orange" else "a", "moving", "on", "background")
    return Clip(colour, shape, direction, background)


def test_no_full_caption_loses_or_changes_an_attribute() -> None:
    assert [parse(caption(clip)) for clip in every_clip()] == list(every_clip())


def test_captions_read_as_documented() -> None:
    assert caption(CIRCLE) == "a red circle moving right on a white background"
    assert caption(CIRCLE, background=False) == "a red circle moving right"
    assert caption(Clip("orange", "heart", "up", "blue")) == "an orange heart moving up on a blue background"
    assert caption(Clip("blue", "heart", "up", "orange")) == "a blue heart moving up on an orange background"


def test_training_does_not_starve_a_kind_of_caption() -> None:
    texts = [sample_caption(CIRCLE, generator) for generator in [generator()] for _ in range(4000)]
    shares = {text: texts.count(text) / len(texts) for text in set(texts)}
    expected = {"": EMPTY_SHARE, caption(CIRCLE, background=False): PARTIAL_SHARE}
    expected[caption(CIRCLE)] = 1 - EMPTY_SHARE - PARTIAL_SHARE
    assert shares == pytest.approx(expected, abs=0.02)


def test_the_world_leaves_nothing_out_and_never_hides_a_shape() -> None:
    clips = every_clip()
    assert len(clips) == len(set(clips)) == len(COLOURS) * len(SHAPES) * len(DIRECTIONS) * (len(COLOURS) - 1)
    drawn = sample_clips(3000, generator())
    assert {clip.colour for clip in drawn} == {clip.background for clip in drawn} == set(COLOURS)
    assert {(clip.shape, clip.direction) for clip in drawn} == {(s, d) for s in SHAPES for d in DIRECTIONS}


@pytest.mark.parametrize(
    "words",
    [
        ("red", "blob", "left", "blue"),
        ("red", "star", "sideways", "blue"),
        ("red", "star", "up", "red"),
        ("pink", "star", "up", "red"),
    ],
)
def test_a_clip_that_cannot_be_drawn_is_refused(words: tuple[str, str, str, str]) -> None:
    with pytest.raises(ValueError, match=r"expected one of|cannot be seen"):
        Clip(*words)


def test_the_same_seed_does_not_draw_two_different_clips() -> None:
    clips = sample_clips(4, generator(3))
    assert clips == sample_clips(4, generator(3))
    assert torch.equal(render_clips(clips, generator(5)), render_clips(clips, generator(5)))
    assert not torch.equal(render_clips(clips, generator(5)), render_clips(clips, generator(6)))


def test_a_clip_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    clips = sample_clips(4, generator())
    together = render_clips(clips)
    assert together.shape == (4, FRAMES, 3, SIDE, SIDE)
    assert all(torch.equal(render_clips([clip])[0], frames) for clip, frames in zip(clips, together, strict=True))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_frame_goes_further_than_another_or_off_the_line(direction: str) -> None:
    mask = clip_masks([Clip("red", "star", direction, "white")])[0]
    steps = (torch.arange(SIDE) + 0.5) * (PICTURE / SIDE)
    area = mask.sum(dim=(1, 2))
    x, y = (mask.sum(dim=1) * steps).sum(dim=1) / area, (mask.sum(dim=2) * steps).sum(dim=1) / area
    stride = torch.stack([x.diff(), y.diff()], dim=1)
    expected = torch.tensor(DIRECTIONS[direction]) * (PATH[1] - PATH[0]) / (FRAMES - 1)
    torch.testing.assert_close(stride, expected.expand(FRAMES - 1, 2), atol=0.1, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_does_not_touch_the_border_that_shows_the_background(shape: str) -> None:
    clips = [Clip("red", shape, direction, "white") for direction in DIRECTIONS]
    mask = clip_masks(clips, generator())
    border = torch.ones(SIDE, SIDE, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    assert float(mask[..., border].max()) == 0.0


def test_jitter_moves_whole_paths_and_only_a_little() -> None:
    clips = sample_clips(100, generator())
    shift = paths(clips, generator(1)) - paths(clips)
    assert float(shift.abs().max()) <= JITTER_CENTRE + 1e-4
    assert float(shift.abs().max()) > 0.9 * JITTER_CENTRE
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), atol=1e-4, rtol=0)


def test_latents_are_not_marked_for_frames_that_they_do_not_show() -> None:
    for frame, latent in ((0, 0), (1, 1), (4, 1), (5, 2), (16, 4)):
        mask = torch.zeros(1, FRAMES, SIDE, SIDE)
        mask[0, frame, 9, 63] = 0.4
        assert shown(mask, 8, 4).nonzero().tolist() == [[0, latent, 1, 7]]
