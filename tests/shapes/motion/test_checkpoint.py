"""The shipped checkpoint is a real `WanPipeline` that shows what it is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from safelight.shapes.motion import caption, judge_clip, sample_clips
from safelight.shapes.motion.train.text import tokenizer
from safelight.tests.effort import chosen, examples

CHECKPOINT = Path(__file__).resolve().parents[3] / "assets" / "shapes-video"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    loaded = WanPipeline.from_pretrained(CHECKPOINT)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def defaults() -> dict[str, Any]:
    kept: dict[str, Any] = json.loads((CHECKPOINT / "safelight.json").read_text())["defaults"]
    return kept


def test_the_checkpoint_does_not_outgrow_the_repository() -> None:
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25 * MEGABYTE
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_loading_does_not_change_the_token_ids(pipeline: WanPipeline) -> None:
    texts = [caption(clip) for clip in sample_clips(50, torch.Generator().manual_seed(0))] + ["", "A Red Zebra."]
    assert pipeline.tokenizer(texts).input_ids == tokenizer()(texts).input_ids


def test_the_kept_defaults_are_those_of_the_training_clips(defaults: dict[str, Any]) -> None:
    assert defaults == {"width": 64, "height": 64, "num_frames": 17, "max_sequence_length": 32}


@pytest.mark.parametrize("length", chosen(32, nightly=[512]))
def test_clips_do_not_show_something_else_than_was_asked(
    pipeline: WanPipeline, defaults: dict[str, Any], length: int
) -> None:
    """At the kept text length and at the pipeline's own, with the pipeline's default steps and guidance."""
    clips = sample_clips(examples(4, 8) if length == 32 else examples(2, 4), torch.Generator().manual_seed(3))
    options = {**defaults, "max_sequence_length": length}
    noise = torch.Generator().manual_seed(4)
    frames = pipeline([caption(clip) for clip in clips], generator=noise, **options).frames
    right = [judge_clip(shown).matches(clip) for shown, clip in zip(frames, clips, strict=True)]
    # well below the card's figures, so that it fails for a broken checkpoint and not for other kernels' rounding
    assert sum(right) >= len(clips) * 3 // 4


def test_a_clip_without_guidance_does_not_show_something_else(pipeline: WanPipeline, defaults: dict[str, Any]) -> None:
    clips = sample_clips(4, torch.Generator().manual_seed(6))
    noise = torch.Generator().manual_seed(7)
    frames = pipeline([caption(clip) for clip in clips], generator=noise, guidance_scale=1.0, **defaults).frames
    assert sum(judge_clip(shown).matches(clip) for shown, clip in zip(frames, clips, strict=True)) >= 3


def test_half_precision_does_not_break_the_pipeline(defaults: dict[str, Any]) -> None:
    half = WanPipeline.from_pretrained(CHECKPOINT, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    clip = sample_clips(1, torch.Generator().manual_seed(5))[0]
    frames = half(caption(clip), generator=torch.Generator().manual_seed(0), **defaults).frames[0]
    assert judge_clip(frames).matches(clip)
