"""A request that gives nothing gets diffusers' defaults, or those that the server documents."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from safelight.benchmarks.coverage.build import build
from safelight.protocol.config import Config
from safelight.protocol.generation import Generate, Sample
from safelight.protocol.replicas import ModelInfo
from safelight.tests.tiny import FAMILIES
from safelight.worker.forward.batcher import Batcher
from safelight.worker.model.model import Model, load_model
from safelight.worker.model.pipeline_task import new_task
from safelight.worker.requests.outputs import first_output
from safelight.worker.requests.sample import SampleRun

SMALL = 4
"""Latent pixels a side in which a pipeline draws whose default size stands in code, in place of 128."""

LONGEST = 96
"""Tokens that the models' tokenizers are made for: fewer than the pipelines' default, and more than the prompt has."""


def changed(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """``pipeline`` with another size in code than its autoencoder's, and tokenizers for short texts."""
    if getattr(pipeline, "default_sample_size", None) == 128:
        pipeline.default_sample_size = SMALL
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer") and part.model_max_length > 77:
            part.model_max_length = LONGEST
    return pipeline


def with_changes(model: Model) -> Model:
    model.text = new_task(changed(model.pipeline), Config(), {})
    return model


def asked(**changes: Any) -> Generate:
    """A request with a prompt and a seed alone."""
    return Generate(request_id="a", samples=[Sample("a red circle", 7)], **changes)


def drawn(model: Model, request: Generate) -> torch.Tensor:
    run = SampleRun(model, request, 0, lambda *_: None, lambda _: None)
    batcher = Batcher(max_batch=16, max_tokens=10**6)
    batcher.start(run.coroutine)
    while batcher.busy:
        batcher.step()
    if run.coroutine.error is not None:
        raise run.coroutine.error
    picture: torch.Tensor = run.coroutine.result
    return picture


def shown(info: ModelInfo) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in info.arguments.items()}


@pytest.mark.parametrize("name", ["flux", "chroma", "lumina2", "sd3"])
def test_a_deterministic_request_of_a_prompt_alone_is_what_diffusers_makes_of_the_prompt(
    name: str, tiny_model: Callable[[str], Model]
) -> None:
    model = with_changes(tiny_model(name))
    pipeline = changed(DiffusionPipeline.from_pretrained(model.path))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    expected = first_output(pipeline("a red circle", generator=generator, output_type="pt"))
    assert torch.equal(drawn(model, asked(deterministic=True)), expected)
    info = model.info()
    said = shown(info) | info.deterministic_defaults
    assert (said["height"], said["width"]) == expected.shape[-2:]


@pytest.mark.parametrize("name", ["sd15", "flux", "lumina2"])
def test_the_model_says_the_defaults_that_take_effect(name: str, tiny_model: Callable[[str], Model]) -> None:
    model = with_changes(tiny_model(name))
    said = shown(model.info())
    assert drawn(model, asked(num_inference_steps=2)).shape[-2:] == (said["height"], said["width"])


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if "image" not in family.call])
def test_the_defaults_said_are_those_that_the_pipeline_is_called_with(
    name: str, tiny_model: Callable[[str], Model]
) -> None:
    """The pipeline computes an argument that is ``None``; dictionaries are not documented."""
    model = with_changes(tiny_model(name))
    info = model.info()
    for deterministic in (False, True):
        run = SampleRun(model, asked(deterministic=deterministic), 0, lambda *_: None, lambda _: None)
        call = inspect.signature(type(model.pipeline).__call__).bind(model.pipeline, **run.arguments())
        call.apply_defaults()
        for argument, value in (shown(info) | (info.deterministic_defaults if deterministic else {})).items():
            passed = call.arguments[argument]
            assert value == passed or passed is None or isinstance(passed, dict), argument


def test_the_reported_text_length_is_the_one_that_texts_are_padded_to(tiny_model: Callable[[str], Model]) -> None:
    info = with_changes(tiny_model("flux")).info()
    assert shown(info)["max_sequence_length"] == LONGEST
    assert info.deterministic_defaults["max_sequence_length"] == 512


def test_values_that_a_pipeline_computes_for_missing_arguments_are_reported(
    tiny_model: Callable[[str], Model],
) -> None:
    """The sizes stand in the pipelines' code or in their models' configurations, and nowhere in a signature."""
    sizes = {"zimage": (1024, 1024, None), "cogvideox": (32, 32, 9), "qwenimage": (1024, 1024, None)}
    for name, (width, height, frames) in sizes.items():
        info = tiny_model(name).info()
        assert (info.default_width, info.default_height, info.default_num_frames) == (width, height, frames)
        assert (shown(info)["width"], shown(info)["height"]) == (width, height)


@pytest.mark.parametrize(
    ("name", "needed"), [("PixArtSigmaPipeline", {"use_resolution_binning": False}), ("HunyuanDiTPipeline", {})]
)
def test_sizes_are_rounded_as_diffusers_rounds_them_wherever_it_can(
    name: str, needed: dict[str, bool], tmp_path: Path
) -> None:
    """PixArt has no table for this model's size and refuses to round; Hunyuan-DiT rounds for a model of any size."""
    build(name).save_pretrained(tmp_path)
    model = load_model(Config(model=str(tmp_path), device="cpu"))
    assert model.text is not None
    assert model.text.plain_defaults == needed
    assert shown(model.info())["use_resolution_binning"] is (not needed)


def test_what_a_pipeline_changes_before_its_first_call_is_changed_back(
    tiny_model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("sd15")
    check = type(model.pipeline).check_inputs

    def check_inputs(pipeline: DiffusionPipeline, *args: Any) -> None:
        pipeline.unet.mid_block = None
        check(pipeline, *args)

    monkeypatch.setattr(type(model.pipeline), "check_inputs", check_inputs)
    new_task(model.pipeline, Config(), {})
    assert model.pipeline.unet.mid_block is not None
