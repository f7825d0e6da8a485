"""Which pipelines are tried for requests with an image."""

from __future__ import annotations

import diffusers
import pytest
from diffusers.pipelines import auto_pipeline

from safelight.worker.pipelines.image_variants import as_taken, image_arguments, image_variants, takes_image

TABLES = (
    (auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING),
    (auto_pipeline.AUTO_TEXT2VIDEO_PIPELINES_MAPPING, auto_pipeline.AUTO_IMAGE2VIDEO_PIPELINES_MAPPING),
)


def test_diffusers_own_pairs_are_found() -> None:
    """But for those in which the pipeline for text takes images itself, with which nothing else is tried."""
    pairs = [(text, images[name]) for texts, images in TABLES for name, text in texts.items() if images.get(name)]
    assert len(pairs) > 20
    for text, image in pairs:
        assert image_variants(text) == [text if takes_image(text) else image]


@pytest.mark.parametrize(
    ("text", "images"),
    [
        ("FluxPipeline", ["FluxImg2ImgPipeline"]),
        ("WanPipeline", ["WanImageToVideoPipeline"]),
        ("Kandinsky5T2VPipeline", ["Kandinsky5I2VPipeline"]),
        ("SanaVideoPipeline", ["SanaImageToVideoPipeline"]),
        ("SanaPipeline", []),
        ("Flux2Pipeline", ["Flux2Pipeline"]),
    ],
)
def test_pairs_of_names(text: str, images: list[str]) -> None:
    assert [cls.__name__ for cls in image_variants(getattr(diffusers, text))] == images


def test_an_argument_for_images_alone_in_a_list_is_found_and_gets_a_list() -> None:
    """``JoyImageEditPlusPipeline`` looks at ``images[0]``, also of one image."""
    assert image_arguments(diffusers.JoyImageEditPlusPipeline) == ("images",)
    assert as_taken("images", "a picture") == ["a picture"]
    assert as_taken("images", ["a picture", "another"]) == ["a picture", "another"]
    assert as_taken("image", "a picture") == "a picture"
