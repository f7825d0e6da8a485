"""The judge reads what was drawn, through the damage that pictures suffer, and admits when there is nothing to read."""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from safelight.shapes import Scene, judge, render, sample_scenes
from safelight.shapes.judge import Picture
from safelight.shapes.templates import blur
from safelight.tests.effort import examples

COUNT = examples(100, 250)
SCENES = sample_scenes(COUNT, torch.Generator().manual_seed(11))


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """One jittered picture for each scene, [COUNT, 3, 128, 128]."""
    return render(SCENES, torch.Generator().manual_seed(12))


def image(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture.movedim(0, -1) * 255).round().byte().numpy())


def compressed(picture: Tensor, quality: int) -> Image.Image:
    file = io.BytesIO()
    image(picture).save(file, "JPEG", quality=quality)
    return Image.open(file)


def misread(damaged: Iterable[Picture]) -> list[tuple[Scene, object]]:
    verdicts = [(scene, judge(picture)) for scene, picture in zip(SCENES, damaged, strict=True)]
    return [(scene, verdict) for scene, verdict in verdicts if not verdict.matches(scene)]


def test_clean_pictures_are_not_misread(pictures: Tensor) -> None:
    assert misread(pictures) == []


@pytest.mark.parametrize("deviation", [0.05, 0.1])
def test_noise_is_not_taken_for_a_shape(pictures: Tensor, deviation: float) -> None:
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1)) * deviation
    assert len(misread((pictures + noise).clamp(0, 1))) <= 0.01 * COUNT


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_blur_does_not_turn_one_shape_into_another(pictures: Tensor, sigma: float) -> None:
    assert len(misread(blur(picture[:, None], sigma)[:, 0] for picture in pictures)) <= 0.01 * COUNT


@pytest.mark.parametrize("quality", [30, 50])
def test_jpeg_does_not_turn_one_attribute_into_another(pictures: Tensor, quality: int) -> None:
    assert len(misread(compressed(picture, quality) for picture in pictures)) <= 0.01 * COUNT


@pytest.mark.parametrize("side", [64, 96, 256])
def test_another_resolution_is_not_misread(side: int) -> None:
    assert misread(render(SCENES, torch.Generator().manual_seed(2), side)) == []


def test_the_three_kinds_of_picture_are_not_read_differently(pictures: Tensor) -> None:
    for picture in pictures[:10]:
        rounded = image(picture)
        as_array = np.asarray(rounded)
        as_tensor = torch.from_numpy(as_array.copy()).movedim(-1, 0) / 255
        assert judge(rounded) == judge(as_array) == judge(as_tensor)


def _two_shapes() -> Tensor:
    left = render([Scene("red", "circle", "medium", "top left", "white")])[0]
    right = render([Scene("red", "circle", "medium", "bottom right", "white")])[0]
    return torch.minimum(left, right)


NOTHING_TO_READ = {
    "flat": torch.full((3, 128, 128), 0.97),
    "grey": torch.full((3, 128, 128), 0.5),
    "noise": torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0)),
    "gradient": torch.linspace(0, 1, 128).expand(3, 128, 128),
    "two shapes": _two_shapes(),
    "stripes": (torch.arange(128) // 8 % 2).float().expand(3, 128, 128),
    "half and half": torch.cat([torch.zeros(3, 64, 128), torch.ones(3, 64, 128)], dim=1),
}


@pytest.mark.parametrize("name", NOTHING_TO_READ)
def test_a_picture_without_one_clear_shape_is_not_guessed(name: str) -> None:
    verdict = judge(NOTHING_TO_READ[name])
    assert not verdict.clear
    assert verdict.shape is None


def test_a_shape_between_two_places_is_not_given_to_either() -> None:
    picture = render([Scene("red", "star", "small", "center", "white")])[0].roll(-14, dims=2)
    verdict = judge(picture)
    assert (verdict.shape, verdict.position) == ("star", None)


def test_a_wrong_attribute_does_not_match() -> None:
    drawn = Scene("red", "star", "small", "center", "white")
    verdict = judge(render([drawn])[0])
    assert verdict.matches(drawn)
    for other in (
        Scene("blue", "star", "small", "center", "white"),
        Scene("red", "heart", "small", "center", "white"),
        Scene("red", "star", "large", "center", "white"),
        Scene("red", "star", "small", "top left", "white"),
        Scene("red", "star", "small", "center", "black"),
    ):
        assert sum(verdict.right(other).values()) == 4
        assert not verdict.matches(other)


def test_anything_but_an_rgb_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an RGB picture"):
        judge(torch.zeros(1, 128, 128))
