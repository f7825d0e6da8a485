"""Every argument that ``/model_info`` offers can be given, and arrives in the pipeline's form."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load

from safelight.benchmarks.coverage.build import build
from safelight.protocol.config import Config
from safelight.protocol.generation import Generate, Result, Sample
from safelight.protocol.messages import FromWorker
from safelight.worker.forward.batcher import Batcher
from safelight.worker.model.model import Model, load_model
from safelight.worker.pipelines.arguments import call_arguments, offered_arguments
from safelight.worker.pipelines.bounds import bounded
from safelight.worker.pipelines.frame_rate import frame_rate
from safelight.worker.requests.jobs import Jobs
from safelight.worker.requests.outputs import first_output
from safelight.worker.requests.sample import SampleRun


def pipelines() -> Iterator[type[DiffusionPipeline]]:
    for name in dir(diffusers):
        if name.endswith("Pipeline"):
            found = getattr(diffusers, name)
            if isinstance(found, type) and issubclass(found, DiffusionPipeline) and found is not DiffusionPipeline:
                yield found


def drawn(model: Model, *requests: Generate) -> list[SampleRun]:
    runs = [SampleRun(model, asked, 0, lambda *_: None, lambda _: None) for asked in requests]
    batcher = Batcher(max_batch=16, max_tokens=10**6)
    for run in runs:
        batcher.start(run.coroutine)
    while batcher.busy:
        batcher.step()
    for run in runs:
        if run.coroutine.error is not None:
            raise run.coroutine.error
    return runs


def finished(model: Model, *requests: Generate) -> list[FromWorker]:
    """The jobs' answer."""
    sent: list[FromWorker] = []
    batcher = Batcher(max_batch=16, max_tokens=10**6)
    jobs = Jobs(model, batcher, sent.append)
    for request in requests:
        jobs.submit(request)
    while batcher.busy or jobs.stats().running:
        batcher.step()
        for request_id in jobs.collect():
            jobs.drop(request_id)
    jobs.close()
    return sent


@pytest.fixture
def tiny_pipeline(tmp_path: Path) -> Callable[[str], Model]:
    def load(name: str) -> Model:
        build(name).save_pretrained(tmp_path / name)
        return load_model(Config(model=str(tmp_path / name), device="cpu"))

    return load


def test_no_pipeline_offers_what_it_would_hand_on_unchecked() -> None:
    """A dictionary reaches attention processors, a language model's ``generate``, ``str.format``; a path the disk."""
    seen = 0
    for pipeline in pipelines():
        for name, parameter in call_arguments(pipeline).items():
            assert "dict" not in parameter.types, (pipeline, name)
            assert not name.endswith("_kwargs"), pipeline
            assert name not in ("fonts", "seed", "image", "batch_size", "text_model_output"), pipeline
            seen += 1
    assert seen > 2000


def test_a_tuple_is_offered_with_its_length_and_everybody_s_prompts_as_text() -> None:
    arguments = call_arguments(diffusers.StableDiffusionXLPipeline)
    size = arguments["original_size"]
    assert (size.types, size.items, size.length, size.is_tuple) == (["list", "null"], ["float"], 2, True)
    assert arguments["crops_coords_top_left"].default == (0, 0)
    assert arguments["prompt_2"].types == ["null", "str"]
    assert not call_arguments(diffusers.FluxPipeline)["sigmas"].is_tuple
    layers = call_arguments(diffusers.Flux2Pipeline)["text_encoder_out_layers"]
    assert (layers.length, layers.is_tuple) == (None, True), "`tuple[int]` is written there for three"


def test_what_says_how_much_a_pipeline_computes_has_a_largest_value_under_any_name() -> None:
    config = Config()
    found = {
        name: parameter.maximum
        for pipeline in pipelines()
        for name, parameter in bounded(call_arguments(pipeline), config, None).items()
    }
    for name in ("num_frames", "frames", "video_length", "num_frames_per_chunk", "segment_frame_length"):
        assert found[name] == config.max_frames, name
    for name in ("prior_num_inference_steps", "original_inference_steps", "pyramid_num_inference_steps_list"):
        assert found[name] == config.max_steps, name
    for name in ("resolution", "output_resolution", "processing_resolution", "upsampling_height", "frame_size"):
        assert found[name] ** 2 == config.max_pixels, name
    for name in ("max_new_tokens", "prompt_max_new_tokens", "tokenizer_max_length", "gen_length"):
        assert found[name] == 4096, name
    assert (found["max_area"], found["layers"]) == (config.max_pixels, config.max_outputs)
    for name in ("original_size", "timesteps", "fps", "frame_rate", "frame_index", "noise_level", "width"):
        assert found[name] is None, name


def test_every_tuple_of_every_pipeline_is_given_as_one() -> None:
    for pipeline in pipelines():
        signature = inspect.signature(pipeline.__call__)
        for name, parameter in call_arguments(pipeline).items():
            written = str(signature.parameters[name].annotation)
            if "list" in parameter.types and "tuple" in written.lower() and "list" not in written.lower():
                assert parameter.is_tuple, (pipeline, name, written)


def test_sdxl_s_sizes_come_from_json_as_diffusers_takes_them(tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("sdxl")
    sizes = {"original_size": [48, 32], "crops_coords_top_left": [4, 8], "target_size": [64, 64]}
    steps = {"num_inference_steps": 2, "width": 64, "height": 64}
    (run,) = drawn(model, Generate(request_id="a", samples=[Sample("a star", 3)], extra=sizes, **steps))  # type: ignore[arg-type]
    tuples = {name: tuple(size) for name, size in sizes.items()}
    generator = torch.Generator().manual_seed(3)
    expected = model.pipeline("a star", generator=generator, output_type="pt", **steps, **tuples)
    assert torch.equal(run.coroutine.result, first_output(expected))


def test_a_schedule_is_offered_where_the_scheduler_can_follow_one(tiny_model: Callable[[str], Model]) -> None:
    pipeline = tiny_model("sdxl").pipeline
    for scheduler in (diffusers.EulerDiscreteScheduler, diffusers.PNDMScheduler, diffusers.DDPMScheduler):
        pipeline.scheduler = scheduler()
        taken = inspect.signature(scheduler.set_timesteps).parameters
        offered = offered_arguments(pipeline)
        assert {"sigmas", "timesteps"} & offered.keys() == {"sigmas", "timesteps"} & taken.keys()


def test_clip_skip_is_offered_where_the_text_encoder_lets_the_pipeline_do_it(
    tiny_model: Callable[[str], Model],
) -> None:
    """StableDiffusionPipeline reaches for ``text_encoder.text_model``, which transformers 5 has no more."""
    for name in ("sd15", "sdxl"):
        model = tiny_model(name)
        try:
            model.pipeline("a star", clip_skip=1, num_inference_steps=1, width=64, height=64)
        except AttributeError:
            assert "clip_skip" not in model.main.arguments
        else:
            assert "clip_skip" in model.main.arguments


@pytest.mark.parametrize(
    ("pipeline", "rate"),
    [
        (diffusers.CogVideoXPipeline, 8),
        (diffusers.StableVideoDiffusionPipeline, 7),
        (diffusers.WanPipeline, 16),
        (diffusers.HunyuanVideoPipeline, 15),
        (diffusers.HunyuanVideo15ImageToVideoPipeline, 24),
        (diffusers.LTXPipeline, 25),
        (diffusers.LTX2Pipeline, 24),
        (diffusers.CosmosTextToWorldPipeline, 30),
        (diffusers.AllegroPipeline, 15),
        (diffusers.AnimateDiffPipeline, 10),  # by export_to_gif's own default
        (diffusers.MochiPipeline, 10),
        (diffusers.SkyReelsV2Pipeline, 24),
    ],
)
def test_a_clip_plays_as_fast_as_diffusers_own_example_exports_it(pipeline: type[DiffusionPipeline], rate: int) -> None:
    assert frame_rate(pipeline, call_arguments(pipeline), {}) == rate


def test_a_clip_plays_at_the_rate_that_its_model_was_given(tiny_model: Callable[[str], Model]) -> None:
    model, small = tiny_model("ltx"), {"num_inference_steps": 1, "width": 64, "height": 64, "num_frames": 9}
    reported = [
        ({"frame_rate": 7.6}, None, 8),
        ({"frame_rate": 1e9}, None, 240),
        ({"frame_rate": 12}, 10, 10),
        ({}, None, 25),
    ]
    requests = [
        Generate(request_id=f"{rate}", samples=[Sample("a", 1)], extra=extra, fps=fps, output_format="mp4", **small)  # type: ignore[arg-type]
        for extra, fps, rate in reported
    ]
    results = finished(model, *requests)
    assert len(results) == len(reported)
    for result in results:
        assert isinstance(result, Result)
        assert result.outputs[0].fps == int(result.request_id)


def test_a_default_of_the_checkpoint_goes_before_the_pipeline_s_own() -> None:
    arguments = call_arguments(diffusers.LTXPipeline)
    assert frame_rate(diffusers.LTXPipeline, arguments, {"frame_rate": 12}) == 12


def test_ltx2_s_sound_is_the_one_that_diffusers_gives_and_reaches_the_file(
    tiny_pipeline: Callable[[str], Model],
) -> None:
    model = tiny_pipeline("LTX2Pipeline")
    size: dict[str, Any] = {"num_inference_steps": 1, "width": 64, "height": 64, "num_frames": 9, "output_format": "pt"}
    names = ("guidance_scale", "stg_scale", "modality_scale")
    unguided = {name: float(name != "stg_scale") for name in names}  # a fourth of the forwards
    size |= {"extra": unguided | {f"audio_{name}": value for name, value in unguided.items()}}
    size |= {"guidance_scale": size["extra"].pop("guidance_scale")}
    asked = [Generate(request_id=str(i), samples=[Sample("a star", i)], deterministic=i == 0, **size) for i in range(3)]
    files = {}
    for result in finished(model, *asked):
        assert isinstance(result, Result)
        (output,) = result.outputs
        assert (output.audio_sample_rate, output.fps) == (model.pipeline.vocoder.config.output_sampling_rate, 24)
        files[result.request_id] = load(bytes(output.data))
    for index, gap in ((0, 0.0), (2, 1e-4)):  # the last was merged with the one before it
        arguments = SampleRun(model, asked[index], 0, lambda *_: None, lambda _: None).arguments()
        expected = model.pipeline(**arguments).audio[0]
        assert (files[str(index)]["audio"] - expected).abs().max() <= gap
