"""Pipelines that do one thing in another way than most, in the tiny forms of the coverage benchmark."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from safelight.protocol.generation import Generate, Image, Sample
from safelight.worker.crossing.call import Call, cross
from safelight.worker.crossing.fork import Fork, schedulers
from safelight.worker.forward.batcher import Batcher
from safelight.worker.model.first_call import variables_at_first_call
from safelight.worker.model.model import Model, load_model
from safelight.worker.model.modules import modules
from safelight.worker.requests.outputs import first_output
from safelight.worker.requests.sample import SampleRun
from safelight.worker.self_test.self_test import SelfTest

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


def test_a_pipeline_that_takes_no_sides_is_tried_with_larger_images_too(tested: Callable[[str], Model]) -> None:
    """aMUSEd's mask of 32 pixels would be empty, as diffusers halves it three times and then rounds to 8."""
    model = tested("AmusedInpaintPipeline")
    assert model.image is not None, model.no_image
    assert model.image.tried_size == {"width": 64, "height": 64}


def test_a_pipeline_that_does_not_run_without_an_optional_argument_requires_it(tmp_path: Path) -> None:
    config = Config(model=str(tmp_path / "model"), device="cpu")
    build("EasyAnimatePipeline").save_pretrained(config.model)
    model, again = load_model(config), load_model(config)
    with pytest.raises(TypeError, match="'NoneType' object is not iterable"):
        DiffusionPipeline.from_pretrained(config.model)("a star", width=32, height=32, num_frames=5)
    self_test = SelfTest(model, config)
    result = self_test.run()
    assert result.text is not None
    assert result.text.required == ["negative_prompt"]
    SelfTest(again, config).apply(result)  # as another replica does
    for one in (model, again):
        assert one.text is not None
        assert [name for name, argument in one.text.arguments.items() if argument.is_required] == ["negative_prompt"]


def test_a_pipeline_that_wants_boxes_with_what_is_in_them_requires_both(tmp_path: Path) -> None:
    config = Config(model=str(tmp_path), device="cpu", batching="serial")
    build("StableDiffusionGLIGENPipeline").save_pretrained(tmp_path)
    model = load_model(config)
    SelfTest(model, config).run()
    assert model.text is not None
    required = {name for name, argument in model.text.arguments.items() if argument.is_required}
    assert required == {"gligen_phrases", "gligen_boxes"}


def test_a_pipeline_that_consists_of_pipelines_comes_to_the_boundary_from_each_of_them() -> None:
    """Kandinsky's calls a pipeline for the prior and one for the picture, which hold the components themselves."""
    pipeline, called = build("KandinskyV22CombinedPipeline"), set()
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"prompt": "a star", "width": 64, "height": 64, "output_type": "np"}
    arguments |= {"num_inference_steps": 2, "prior_num_inference_steps": 2}

    def crossing(call: Call) -> Any:
        called.add(call.component)
        return cross(call)

    with Fork(pipeline, crossing) as forked:
        found = forked(**arguments, generator=torch.Generator().manual_seed(7)).images
    assert called >= {"prior_text_encoder", "prior_prior", "unet"}
    assert [part.num_inference_steps for part in schedulers(pipeline)] == [None, None], "the fork has its own"
    assert (found == pipeline(**arguments, generator=torch.Generator().manual_seed(7)).images).all()


def test_the_defaults_of_a_pipeline_that_consists_of_pipelines_are_found_without_a_forward() -> None:
    pipeline = build("KandinskyV22InpaintCombinedPipeline")
    for part in modules(pipeline).values():
        part.register_forward_pre_hook(lambda *_: pytest.fail("a component was called"))
    made = variables_at_first_call(pipeline, ("image", "mask_image"))
    assert made is not None
    assert (made["width"], made["height"]) == (512, 512)


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
    batcher = Batcher(max_batch=16, max_tokens=10**6)
    batcher.start(run.coroutine)
    while batcher.busy:
        batcher.step()
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


def asked(index: int, **extra: object) -> Generate:
    samples, side = [Sample("a red circle", seed=index)], 64
    return Generate(
        request_id=str(index),
        samples=samples,
        num_inference_steps=2,
        width=side,
        height=side,
        deterministic=True,
        extra=extra,
    )


def run_of(model: Model, request: Generate) -> SampleRun:
    return SampleRun(model, request, 0, lambda *_: None, lambda _: None)


def plain(model: Model, request: Generate) -> torch.Tensor:
    return first_output(model.task(request).pipeline(**run_of(model, request).arguments()))


def drawn(model: Model, requests: list[Generate]) -> list[torch.Tensor]:
    """The requests together, in turns."""
    batcher, runs = Batcher(max_batch=4, max_tokens=10**6), [run_of(model, request) for request in requests]
    for run in runs:
        batcher.start(run.coroutine)
    while batcher.busy:
        batcher.step()
    assert [run.coroutine.error for run in runs] == [None] * len(runs)
    return [run.coroutine.result for run in runs]


def two_of(name: str, folder: Path, **config: object) -> tuple[Model, Model]:
    """A model to serve, and the same for plain diffusers."""
    build(name).save_pretrained(folder)
    one, other = (load_model(Config(model=str(folder), device="cpu", **config)) for _ in range(2))  # type: ignore[arg-type]
    return one, other


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """In float16, where the pipeline casts the autoencoder to float32 for a decoding and back."""
    one, other = two_of("StableDiffusionXLPipeline", tmp_path_factory.mktemp("sdxl"), dtype="float16")
    assert one.pipeline.vae.config.force_upcast
    return one, other


def test_requests_that_upcast_the_autoencoder_at_once_are_bitwise_what_diffusers_gives(
    sdxl: tuple[Model, Model],
) -> None:
    served, fresh = sdxl
    requests = [asked(index) for index in range(3)]
    assert all(map(torch.equal, drawn(served, requests), [plain(fresh, request) for request in requests]))


def test_a_cancelled_request_never_leaves_the_autoencoder_in_float32(sdxl: tuple[Model, Model]) -> None:
    served, fresh = sdxl
    turns, finished = 0, False
    while not finished:
        turns += 1
        batcher, doomed = Batcher(max_batch=4, max_tokens=10**6), run_of(served, asked(0))
        batcher.start(doomed.coroutine)
        for _ in range(turns):
            batcher.step()
        finished = doomed.coroutine.finished
        batcher.cancel(doomed.coroutine)
        assert {tensor.dtype for tensor in served.pipeline.vae.parameters()} == {torch.float16}
    assert turns > 4, "cancelled at every call of it"
    assert torch.equal(drawn(served, [asked(1)])[0], plain(fresh, asked(1)))


def test_new_weights_that_come_while_the_autoencoder_is_upcast_are_the_ones_that_stay(
    sdxl: tuple[Model, Model],
) -> None:
    served, fresh = sdxl
    batcher, waiting = Batcher(max_batch=4, max_tokens=10**6), run_of(served, asked(0))
    batcher.start(waiting.coroutine)
    name = "decoder.conv_out.weight"
    new = fresh.layouts["vae"].local(name) * 1.5
    while not waiting.coroutine.finished:  # between every two calls, so between the two casts as well
        batcher.step()
        with batcher.aside():
            served.layouts["vae"].write(name, new)
    fresh.layouts["vae"].write(name, new)
    assert torch.equal(served.layouts["vae"].local(name), new)
    assert torch.equal(waiting.coroutine.result, plain(fresh, asked(0)))
    assert torch.equal(drawn(served, [asked(1)])[0], plain(fresh, asked(1)))


def test_layers_that_a_pipeline_knows_by_their_exact_type_are_switched_for_one_request_alone(tmp_path: Path) -> None:
    """GLIGEN's, which are on for the first part of the steps."""
    served, fresh = two_of("StableDiffusionGLIGENPipeline", tmp_path)
    boxes = {"gligen_phrases": ["a star"], "gligen_boxes": [[0.1, 0.2, 0.6, 0.7]]}
    requests = [asked(0, **boxes, gligen_scheduled_sampling_beta=part) for part in (0.0, 0.5, 1.0)]
    expected = [plain(fresh, request) for request in requests]
    assert not torch.equal(expected[0], expected[1])
    assert not torch.equal(expected[1], expected[2])
    assert all(map(torch.equal, drawn(served, requests), expected))


def test_requests_that_follow_gradients_are_bitwise_what_diffusers_gives(tmp_path: Path) -> None:
    """Attend-and-Excite moves the latents so that the UNet attends more to some words."""
    served, fresh = two_of("StableDiffusionAttendAndExcitePipeline", tmp_path)
    requests = [asked(0, attn_res=[2, 2], token_indices=[word]) for word in (1, 2)]
    expected = [plain(fresh, request) for request in requests]
    assert not torch.equal(*expected)
    assert all(map(torch.equal, drawn(served, requests), expected))


def test_an_argument_that_a_pipeline_writes_into_its_model_changes_nobody_else_s_picture(tmp_path: Path) -> None:
    served, fresh = two_of("SkyReelsV2DiffusionForcingPipeline", tmp_path)
    usual = msgspec.structs.replace(asked(0, base_num_frames=13, max_sequence_length=16, ar_step=0), num_frames=13)
    expected = plain(fresh, usual)
    blocks = msgspec.structs.replace(usual, extra=usual.extra | {"causal_block_size": 2})
    in_blocks = plain(fresh, blocks)
    assert not torch.equal(in_blocks, expected)
    made = drawn(served, [usual, blocks, usual])
    assert torch.equal(made[0], expected)
    assert torch.equal(made[1], in_blocks)
    assert torch.equal(made[2], expected)
    assert torch.equal(drawn(served, [usual])[0], expected)
