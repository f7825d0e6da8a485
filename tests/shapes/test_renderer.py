"""The renderer draws the same picture for the same seed, with edges that are neither jagged nor smeared."""

from __future__ import annotations

import pytest
import torch

from safelight.shapes import Scene, render, sample_scenes
from safelight.shapes.render import DISTANCES, JITTER_CENTRE, JITTER_RADIUS, coverage, place
from safelight.shapes.scene import COLOURS, POSITIONS, SHAPES, SIZES


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_same_seed_does_not_draw_two_different_pictures() -> None:
    scenes = sample_scenes(20, generator())
    assert torch.equal(render(scenes, generator(5)), render(scenes, generator(5)))
    assert not torch.equal(render(scenes, generator(5)), render(scenes, generator(6)))


def test_the_same_seed_does_not_draw_two_different_scenes() -> None:
    assert sample_scenes(50, generator(3)) == sample_scenes(50, generator(3))


def test_a_picture_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    scenes = sample_scenes(12, generator())
    together = render(scenes)
    assert all(torch.equal(render([scene])[0], picture) for scene, picture in zip(scenes, together, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_neither_jagged_nor_smeared(shape: str) -> None:
    """The band of mixed pixels is about one pixel wide: more than none, fewer than 1.6 for a pixel of outline."""
    mask = coverage([shape], place([Scene("red", shape, "large", "center", "white")]))[0]
    mixed = float(((mask > 0.01) & (mask < 0.99)).sum())
    vertical = (mask[1:] - mask[:-1]).abs().sum()
    horizontal = (mask[:, 1:] - mask[:, :-1]).abs().sum()
    assert 0.3 * float(vertical + horizontal) < mixed + float(shape in ("square", "cross")) * 1e3
    assert mixed < 1.6 * float(vertical + horizontal)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_distance_has_the_wrong_sign(shape: str) -> None:
    inside, outside = (DISTANCES[shape](torch.tensor([x]), torch.tensor([0.05])) for x in (0.0, 1.6))
    assert float(inside) < 0 < float(outside)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_lower_resolution_does_not_move_or_resize_the_shape(shape: str) -> None:
    placement = place([Scene("red", shape, "medium", "top right", "white")])
    fine, coarse = coverage([shape], placement, 128), coverage([shape], placement, 64)
    halved = torch.nn.functional.avg_pool2d(fine, 2)
    assert float((halved - coarse).abs().max()) < 0.5
    assert abs(float(halved.sum() - coarse.sum())) < 0.05 * float(coarse.sum())


def test_jitter_stays_within_its_bounds() -> None:
    scenes = sample_scenes(500, generator())
    nominal, jittered = place(scenes), place(scenes, generator(1))
    assert float((nominal.x - jittered.x).abs().max()) <= JITTER_CENTRE
    assert float((nominal.y - jittered.y).abs().max()) <= JITTER_CENTRE
    assert float((jittered.radius / nominal.radius - 1).abs().max()) <= JITTER_RADIUS + 1e-6


def test_sampling_leaves_no_value_out_and_never_hides_a_shape() -> None:
    scenes = sample_scenes(3000, generator())
    assert {scene.colour for scene in scenes} == {scene.background for scene in scenes} == set(COLOURS)
    assert {scene.shape for scene in scenes} == set(SHAPES)
    assert {(scene.size, scene.position) for scene in scenes} == {(s, p) for s in SIZES for p in POSITIONS}
    assert all(scene.colour != scene.background for scene in scenes)


@pytest.mark.parametrize(
    "words", [("red", "blob", "small", "center", "blue"), ("red", "star", "small", "center", "red")]
)
def test_a_scene_that_cannot_be_drawn_is_refused(words: tuple[str, str, str, str, str]) -> None:
    with pytest.raises(ValueError, match=r"expected one of|cannot be seen"):
        Scene(*words)
