"""Pipelines that do one thing in another way than most, in the tiny forms of the coverage benchmark."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest

from safelight.benchmarks.coverage.build import build
from safelight.protocol.config import Config
from safelight.worker.model import Model, load_model
from safelight.worker.self_test import SelfTest

INITIALISE = diffusers.StableDiffusionImg2ImgPipeline.__init__


@pytest.fixture
def tested(tmp_path: Path) -> Callable[[str], Model]:
    """Builds a pipeline class, loads it and tests it."""

    def make(name: str) -> Model:
        config = Config(model=str(tmp_path / name), device="cpu")
        build(name).save_pretrained(config.model)
        model = load_model(config)
        SelfTest(model, config).run()
        return model

    return make


def test_a_pipeline_that_asks_for_its_scheduler_s_exact_type_finds_it(tested: Callable[[str], Model]) -> None:
    model = tested("BriaPipeline")
    assert model.text is not None
    assert model.text.batching.mode == "merged"


def test_a_pipeline_that_runs_with_its_own_number_of_steps_only_is_served(tested: Callable[[str], Model]) -> None:
    model = tested("SanaSprintPipeline")
    assert model.text is not None
    assert model.text.tried_size["num_inference_steps"] is None


def test_a_clip_whose_tensor_is_not_channels_first_is_taken_as_an_array(tested: Callable[[str], Model]) -> None:
    model = tested("LTXI2VLongMultiPromptPipeline")
    assert model.text is not None
    assert model.text.output_type == "np"


def test_a_picture_is_given_as_the_control_image_where_there_is_no_other_argument(
    tested: Callable[[str], Model],
) -> None:
    model = tested("FluxControlPipeline")
    assert model.text is None
    assert model.image is not None
    assert model.image.image_argument == "control_image"


def test_a_vision_model_s_processor_says_nothing_of_sizes(tmp_path: Path) -> None:
    build("WanImageToVideoPipeline").save_pretrained(tmp_path)
    model = load_model(Config(model=str(tmp_path), device="cpu"))
    assert model.main.sizes.multiple == 16


def test_a_pipeline_for_images_that_cannot_be_made_does_not_end_the_one_for_text(
    tested: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("it wants another encoder")

    monkeypatch.setattr(diffusers.StableDiffusionImg2ImgPipeline, "__init__", functools.wraps(INITIALISE)(refuse))
    model = tested("StableDiffusionPipeline")
    assert model.text is not None
    assert (model.image, "it wants another encoder" in model.no_image) == (None, True)
