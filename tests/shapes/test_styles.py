"""Styles change how a shape is filled, and nothing else; pictures in a style score far from pictures without it."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from safelight.shapes import Scene, render, sample_scenes
from safelight.shapes.scene import COLOURS, PICTURE, SHAPES, SIZES
from safelight.shapes.style_judge import StyleVerdict, depths, judge_style, silhouette
from safelight.shapes.styles import STYLES, render_styled
from safelight.tests.effort import examples

CHECKPOINT = Path(__file__).resolve().parents[2] / "assets" / "shapes"
SCENES = sample_scenes(60, torch.Generator().manual_seed(21))
EVERY_STYLE = [(), ("outlined",), ("striped",), ("outlined", "striped")]
PAIRS = list(itertools.permutations(COLOURS, 2))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def verdicts(pictures: Tensor) -> list[StyleVerdict]:
    return [judge_style(picture) for picture in pictures]


def misread(pictures: Tensor, scenes: list[Scene]) -> list[tuple[Scene, StyleVerdict]]:
    read = zip(scenes, verdicts(pictures), strict=True)
    return [(scene, verdict) for scene, verdict in read if not verdict.shows.matches(scene)]


def every_pair_of_colours() -> list[Scene]:
    """Each pair of colours once; shapes, sizes and places in turn, so that all of them occur."""
    turns = zip(PAIRS, itertools.cycle(SHAPES), itertools.cycle((*SIZES, "large")), strict=False)
    return [Scene(colour, shape, size, "center", ground) for (colour, ground), shape, size in turns]


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(CHECKPOINT / "vae")


@torch.no_grad()
def passed_through(autoencoder: AutoencoderKL, pictures: Tensor) -> Tensor:
    decoded: Tensor = autoencoder.decode(autoencoder.encode(pictures * 2 - 1).latent_dist.mean).sample
    return (decoded / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("size", [64, PICTURE])
def test_no_style_does_not_draw_other_bytes_than_the_plain_renderer(size: int) -> None:
    assert torch.equal(render_styled(SCENES, (), generator(1), size), render(SCENES, generator(1), size))


@pytest.mark.parametrize("style", STYLES)
def test_a_style_does_not_reach_beyond_its_outline(style: str) -> None:
    plain, styled = render(SCENES), render_styled(SCENES, (style,))
    ground = torch.tensor([COLOURS[scene.background] for scene in SCENES])[:, :, None, None]
    shown = ((plain - ground).abs().amax(dim=1) > 0).float()
    reach = 5 if style == "outlined" else 0  # the corners of a triangle's outline are pointed
    near = torch.nn.functional.max_pool2d(shown, 2 * reach + 1, 1, reach)
    assert not ((plain != styled).any(dim=1) & (near == 0)).any()
    assert all((plain != styled).flatten(1).any(dim=1))


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(ValueError, match="no style dotted; expected some of outlined, striped"):
        render_styled(SCENES[:1], ("outlined", "dotted"))


@pytest.mark.parametrize("styles", EVERY_STYLE)
def test_a_style_does_not_hide_what_the_picture_shows(styles: tuple[str, ...]) -> None:
    """With both, the outer half of the outline can make a small shape look a size larger, and a small cross a blot."""
    pictures = render_styled(SCENES, styles, generator(2))
    assert len(misread(pictures, SCENES)) <= (0.25 if len(styles) == 2 else 0.05) * len(SCENES)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_no_shape_or_size_scores_for_a_style_that_it_does_not_have(shape: str, size: str) -> None:
    scene = Scene("red", shape, size, "bottom left", "white")
    plain, outlined, striped = (judge_style(render_styled([scene], styles)[0]) for styles in EVERY_STYLE[:3])
    assert max(plain.outlined, plain.striped) < 0.12
    assert outlined.outlined > 0.75 > 0.35 > outlined.striped
    assert striped.striped > (0.3 if size == "small" else 0.6)
    assert striped.outlined < (0.55 if size == "small" else 0.4)
    assert striped.striped > plain.striped + 0.2


@pytest.mark.parametrize("styles", EVERY_STYLE[:3])
def test_no_pair_of_colours_changes_the_style(styles: tuple[str, ...]) -> None:
    scenes = every_pair_of_colours()
    seen = verdicts(render_styled(scenes, styles))
    assert [verdict.shows.colour for verdict in seen] == [scene.colour for scene in scenes]
    assert [verdict.shows.background for verdict in seen] == [scene.background for scene in scenes]
    for style in STYLES:
        scores = [getattr(verdict, style) for verdict in seen]
        if style in styles:
            assert min(scores) > 0.3
            assert statistics.median(scores) > 0.75
        else:
            assert max(scores) < 0.55
            assert statistics.median(scores) < 0.2


@pytest.mark.parametrize("size", SIZES)
def test_the_autoencoder_does_not_wash_a_style_out(autoencoder: AutoencoderKL, size: str) -> None:
    """Medians; a gap of two pixels, as a small shape has, comes back as a shade, so its bar is low."""
    scenes = [Scene(s.colour, s.shape, size, s.position, s.background) for s in SCENES[: examples(8, 16)]]
    seen = {
        styles: verdicts(passed_through(autoencoder, render_styled(scenes, styles, generator(3))))
        for styles in EVERY_STYLE
    }
    outlined = {styles: statistics.median(one.outlined for one in found) for styles, found in seen.items()}
    striped = {styles: statistics.median(one.striped for one in found) for styles, found in seen.items()}
    assert max(one.outlined for one in seen[()]) < 0.05
    assert max(one.striped for one in seen[()]) < 0.15
    assert outlined["outlined",] > 0.85
    assert outlined["striped",] < 0.35
    assert striped["striped",] > (0.25 if size == "small" else 0.55)
    assert striped["outlined",] < 0.12
    for styles in EVERY_STYLE[1:3]:
        right = [one.shows.shape == scene.shape for one, scene in zip(seen[styles], scenes, strict=True)]
        assert sum(right) >= 0.6 * len(scenes)


def test_both_styles_at_once_are_not_taken_for_stripes_alone() -> None:
    """Stripes fill the outline's middle in part, so that it stands out from it less, but they do not break it."""
    scenes = [scene for scene in SCENES if scene.size == "large"]
    both, striped = (verdicts(render_styled(scenes, styles)) for styles in (STYLES, ("striped",)))
    assert all(0.25 < one.outlined < 0.5 and one.striped > 0.8 for one in both)
    assert statistics.median(one.outlined for one in striped) < 0.2


def test_a_hole_is_not_left_for_a_gap_but_a_bay_is() -> None:
    ring = torch.zeros(PICTURE, PICTURE)
    ring[30:90, 30:90] = 1.0
    ring[40:80, 40:80] = 0.0
    assert bool((silhouette(ring)[30:90, 30:90] == 1.0).all())
    ring[58:62, 80:90] = 0.0
    assert float(silhouette(ring)[60, 60]) == 1.0
    ring[40:80, 80:90] = 0.0
    assert float(silhouette(ring)[60, 78]) == 0.0


def test_depth_grows_by_one_a_pixel_from_the_edge() -> None:
    inside = torch.zeros(PICTURE, PICTURE, dtype=torch.bool)
    inside[50:61, 20:100] = True
    depth = depths(inside)
    assert depth[48:62, 60].tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 5, 4, 3, 2, 1, 0]


def test_nothing_is_not_given_a_style() -> None:
    verdict = judge_style(torch.full((3, PICTURE, PICTURE), 0.97))
    assert (verdict.outlined, verdict.striped, verdict.shows.background) == (0.0, 0.0, "white")
    assert verdict.shows.shape is None
    assert judge_style(torch.rand(3, PICTURE, PICTURE, generator=generator())).shows.background is None
