"""How well, and how fast, the embedded shapes-video model draws through a plain `WanPipeline`.

`python -m benchmarks.shapes_video` prints a table and writes `benchmarks/results/shapes_video.json`; `--card` also puts
the figures into the model card. Prompts are drawn afresh from `--seed`; every clip has noise of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from numpy.typing import NDArray

from safelight.shapes.motion import Clip, caption, judge_clip, sample_clips
from safelight.shapes.motion.train.look import animate

from .machine import describe
from .shapes import ROOT, write_card

CHECKPOINT = ROOT / "assets" / "shapes-video"
RESULTS = ROOT / "benchmarks" / "results" / "shapes_video.json"
BATCH = 20
SHOWN = 12
"""Clips in the moving picture that `--gif` writes."""

PROMPT = "a red circle moving right on a white background"


def load(folder: Path, dtype: torch.dtype) -> WanPipeline:
    """The checkpoint with diffusers' defaults but for the dtype."""
    pipeline = WanPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def clips_of(pipeline: WanPipeline, prompts: list[str], seed: int, options: dict[str, Any]) -> NDArray[np.float32]:
    """Clips [B, F, H, W, 3] in [0, 1], clip i from noise seeded with `seed` + i; guidance is the pipeline's default."""
    noise = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    drawn: NDArray[np.float32] = pipeline(prompts, generator=noise, output_type="np", **options).frames
    return drawn


def drawn_in_parts(
    pipeline: WanPipeline, clips: list[Clip], seed: int, options: dict[str, Any]
) -> Iterator[NDArray[np.float32]]:
    """The frames of each clip, `BATCH` clips drawn at a time."""
    for start in range(0, len(clips), BATCH):
        prompts = [caption(clip) for clip in clips[start : start + BATCH]]
        yield from clips_of(pipeline, prompts, seed + start, options)


def percent(right: list[bool]) -> float:
    return round(100 * statistics.mean(right), 1)


def percent_by(clips: list[Clip], right: list[bool], attribute: str) -> dict[str, float]:
    """Percentage of clips that are right, for each value of one attribute of the prompt."""
    groups: dict[str, list[bool]] = {}
    for clip, one in zip(clips, right, strict=True):
        groups.setdefault(getattr(clip, attribute), []).append(one)
    return {value: percent(group) for value, group in sorted(groups.items())}


def seconds(pipeline: WanPipeline, options: dict[str, Any], repeats: int = 5) -> float:
    """Median seconds of one clip, after one to warm up."""
    taken = []
    for seed in range(repeats + 1):
        began = time.perf_counter()
        clips_of(pipeline, [PROMPT], seed, options)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Everything that is reported, ready for JSON."""
    options = json.loads((asked.checkpoint / "safelight.json").read_text())["defaults"]
    options["num_inference_steps"] = asked.steps
    pipeline = load(asked.checkpoint, torch.float32)
    clips = sample_clips(asked.count, torch.Generator().manual_seed(asked.seed))
    frames = list(drawn_in_parts(pipeline, clips, asked.seed * 1_000_000, options))
    if asked.gif:
        animate(np.stack(frames[:SHOWN]), asked.gif)
    right = [judge_clip(shown).right(clip) for shown, clip in zip(frames, clips, strict=True)]
    everything = [all(one.values()) for one in right]
    speed = {"float32": seconds(pipeline, options)}
    speed["bfloat16"] = seconds(load(asked.checkpoint, torch.bfloat16), options)
    return {
        "machine": describe(),
        "prompts": asked.count,
        "seed": asked.seed,
        "options": options,
        "percent_right": {name: percent([one[name] for one in right]) for name in right[0]}
        | {"all": percent(everything)},
        "percent_all_right_by_shape": percent_by(clips, everything, "shape"),
        "percent_all_right_by_direction": percent_by(clips, everything, "direction"),
        "seconds_a_clip": {name: round(value, 2) for name, value in speed.items()},
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    right, options, machine = result["percent_right"], result["options"], result["machine"]
    groups = [*result["percent_all_right_by_shape"].items(), *result["percent_all_right_by_direction"].items()]
    speed = ", ".join(f"{value:.1f} s in {name}" for name, value in result["seconds_a_clip"].items())
    return "\n".join(
        (
            "| " + " | ".join(("all four" if name == "all" else name) for name in right) + " |",
            "|" + " ---: |" * len(right),
            "| " + " | ".join(f"{value:.1f} %" for value in right.values()) + " |",
            "",
            f"{result['prompts']} random full prompts (seed {result['seed']}), {options['num_inference_steps']} steps, "
            f"guidance 5, {options['num_frames']} frames of {options['width']}×{options['height']}, float32, "
            f"`max_sequence_length={options['max_sequence_length']}`.",
            "",
            "All four right, by shape and by direction: "
            + ", ".join(f"{name} {value:.1f} %" for name, value in groups),
            "",
            f"One clip, median: {speed}.",
            f"Machine: {machine['cores']} cores, {machine['processor']}, torch {machine['torch']}.",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shapes_video", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--card", action="store_true", help="put the figures into the checkpoint's README.md")
    parser.add_argument("--gif", type=Path, help=f"where to write the first {SHOWN} clips as one moving picture")
    asked = parser.parse_args()
    result = measure(asked)
    text = table(result)
    print(text)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=2) + "\n")
    if asked.card:
        write_card(asked.checkpoint / "README.md", text)


if __name__ == "__main__":
    main()
