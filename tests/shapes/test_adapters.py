"""The embedded adapters make the embedded model draw in their styles, through nothing but diffusers and peft."""

from __future__ import annotations

import statistics

import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open

from safelight.formats.model_names import EMBEDDED_ADAPTERS, embedded_adapter, resolve_model
from safelight.shapes import caption, sample_scenes
from safelight.shapes.style_judge import StyleVerdict, judge_style
from safelight.shapes.styles import STYLES
from safelight.shapes.train.look import draw

SCENES = [scene for scene in sample_scenes(40, torch.Generator().manual_seed(31)) if scene.size != "small"][:8]


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    loaded = FluxPipeline.from_pretrained(resolve_model("shapes"))
    loaded.set_progress_bar_config(disable=True)
    for name in EMBEDDED_ADAPTERS:
        path = embedded_adapter(name)
        loaded.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    return loaded


def verdicts(pipeline: FluxPipeline, **strengths: float) -> list[StyleVerdict]:
    """On pictures of `SCENES`, from the same noise each time."""
    pipeline.set_adapters(list(strengths), list(strengths.values()))
    return [judge_style(picture) for picture in draw(pipeline, [caption(scene) for scene in SCENES], 6, steps=20)]


def median(seen: list[StyleVerdict], style: str) -> float:
    return statistics.median(getattr(verdict, style) for verdict in seen)


def shown(seen: list[StyleVerdict], attribute: str) -> int:
    """How many pictures have an attribute as it was asked for."""
    return sum(verdict.shows.right(scene)[attribute] for verdict, scene in zip(seen, SCENES, strict=True))


def test_no_adapter_is_missing_or_too_large() -> None:
    assert set(EMBEDDED_ADAPTERS) == set(STYLES)
    for name in EMBEDDED_ADAPTERS:
        assert embedded_adapter(name).stat().st_size < 1_000_000
        with safe_open(embedded_adapter(name), "pt") as file:
            assert all(key.startswith("transformer.") for key in file.keys())  # noqa: SIM118
            assert "lora_adapter_metadata" in file.metadata()


def test_a_name_of_no_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="no embedded adapter 'dotted'; expected one of outlined, striped"):
        embedded_adapter("dotted")


def test_the_model_without_an_adapter_draws_in_no_style(pipeline: FluxPipeline) -> None:
    seen = verdicts(pipeline, outlined=0.0, striped=0.0)
    assert max(median(seen, style) for style in STYLES) < 0.05


@pytest.mark.parametrize(("style", "other"), [STYLES, STYLES[::-1]])
def test_an_adapter_does_not_miss_its_style_or_lose_the_prompt(pipeline: FluxPipeline, style: str, other: str) -> None:
    seen = verdicts(pipeline, **{style: 1.0})
    assert median(seen, style) > 0.5
    assert median(seen, other) < 0.35
    assert min(shown(seen, attribute) for attribute in ("colour", "position", "background")) >= 7
    assert shown(seen, "shape") >= 5


def test_two_adapters_at_once_do_not_lose_either_style(pipeline: FluxPipeline) -> None:
    seen = verdicts(pipeline, outlined=1.0, striped=0.7)
    assert median(seen, "outlined") > 0.15 > median(verdicts(pipeline, striped=1.0), "outlined")
    assert median(seen, "striped") > 0.3
    assert shown(seen, "shape") >= 4
