"""Pipelines that do one thing in another way than most, in the tiny forms of the coverage benchmark."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import diffusers
import msgspec
import pytest
import torch
from diffusers import DiffusionPipeline

from safelight.benchmarks.coverage.asking import picture
from safelight.benchmarks.coverage.build import build
from safelight.protocol.codec import Buffer
from safelight.protocol.config import Config
from safelight.protocol.errors import InvalidRequest
from safelight.protocol.messages import Generate, Image, Sample
from safelight.worker.hub import Hub
from safelight.worker.model import Model, load_model
from safelight.worker.sample import SampleRun
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
    assert model.image.image_arguments == ("control_image",)


def test_a_mask_and_what_guides_are_the_images_behind_the_one_to_go_on_from(tested: Callable[[str], Model]) -> None:
    """The arguments in their order, each with the request's image, beside plain diffusers."""
    model = tested("StableDiffusionControlNetInpaintPipeline")
    assert model.image is not None, model.no_image
    assert model.image.image_arguments == ("image", "mask_image", "control_image")
    pictures = [picture(seed, 64) for seed in range(3)]
    images = [Image(64, 64, Buffer(one.tobytes())) for one in pictures]
    samples, options = [Sample("a red circle", 7)], {"num_inference_steps": 4}
    request = Generate(request_id="a", samples=samples, images=images, extra={"strength": 0.75}, **options)
    run = SampleRun(model, request, 0, lambda *_: None, lambda _: None)
    hub = Hub(max_batch=16, max_tokens=10**6)
    hub.start(run.coroutine)
    while hub.busy:
        hub.turn()
    plain = DiffusionPipeline.from_pretrained(model.path)
    named = dict(zip(("image", "mask_image", "control_image"), pictures, strict=True))
    generator = torch.Generator().manual_seed(7)
    expected = plain(
        "a red circle", **named, **options, strength=0.75, width=64, height=64, generator=generator, output_type="pt"
    )
    assert torch.equal(run.coroutine.result, expected.images[0])
    for wrong in (images[:1], images[:2], images * 2):
        with pytest.raises(InvalidRequest, match="image, mask_image, control_image"):
            SampleRun(
                model, msgspec.structs.replace(request, images=wrong), 0, lambda *_: None, lambda _: None
            ).arguments()


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
