"""How well, and how fast, the embedded shapes model draws through a plain `FluxPipeline`.

`python -m benchmarks.shapes` prints a table and writes `benchmarks/results/shapes.json`; `--card` also puts the
figures into the model card. Prompts are drawn afresh from `--seed`; every picture has noise of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from PIL import Image

from safelight.shapes import Scene, Verdict, caption, judge, sample_scenes

from .machine import describe

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "assets" / "shapes"
RESULTS = ROOT / "benchmarks" / "results" / "shapes.json"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
BATCH = 50
PROMPT = "a small yellow star at the top left on a black background"


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Percentages of pictures in which the judge reads what the prompt says."""

    colour: float
    shape: float
    size: float
    position: float
    background: float
    all: float


def load(folder: Path, dtype: torch.dtype) -> FluxPipeline:
    """The checkpoint with diffusers' defaults but for the dtype."""
    pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pictures(
    pipeline: FluxPipeline, prompts: list[str], noise: list[torch.Generator], length: int
) -> list[Image.Image]:
    """Pictures of the trained size; steps and guidance are the pipeline's defaults."""
    side = pipeline.vae.config.sample_size
    drawn: list[Image.Image] = pipeline(
        prompts, height=side, width=side, max_sequence_length=length, generator=noise
    ).images
    return drawn


def verdicts_on(pipeline: FluxPipeline, scenes: list[Scene], seed: int, length: int) -> Iterator[Verdict]:
    """The judge's verdict on each scene's picture; picture i starts from noise seeded with `seed` + i."""
    for start in range(0, len(scenes), BATCH):
        part = scenes[start : start + BATCH]
        noise = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        prompts = [caption(scene) for scene in part]
        for picture in pictures(pipeline, prompts, noise, length):
            yield judge(picture)


def accuracy(scenes: list[Scene], verdicts: list[Verdict]) -> Accuracy:
    right = [verdict.right(scene) for scene, verdict in zip(scenes, verdicts, strict=True)]
    shares = {name: 100 * statistics.mean(one[name] for one in right) for name in right[0]}
    return Accuracy(**shares, all=100 * statistics.mean(all(one.values()) for one in right))


def accuracy_by(scenes: list[Scene], verdicts: list[Verdict], attribute: str) -> dict[str, float]:
    """Percentage of pictures right in all five attributes, for each value of one attribute of the prompt."""
    groups: dict[str, list[bool]] = {}
    for scene, verdict in zip(scenes, verdicts, strict=True):
        groups.setdefault(getattr(scene, attribute), []).append(verdict.matches(scene))
    return {value: round(100 * statistics.mean(group), 1) for value, group in sorted(groups.items())}


def seconds(pipeline: FluxPipeline, length: int, repeats: int = 7) -> float:
    """Median seconds of one picture, after one to warm up."""
    taken = []
    for seed in range(repeats + 1):
        began = time.perf_counter()
        pictures(pipeline, [PROMPT], [torch.Generator().manual_seed(seed)], length)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is reported, ready for JSON."""
    pipeline = load(options.checkpoint, torch.float32)
    scenes = sample_scenes(options.count, torch.Generator().manual_seed(options.seed))
    verdicts = list(verdicts_on(pipeline, scenes, options.seed * 1_000_000, options.length))
    speed = {"float32": seconds(pipeline, options.length)}
    speed["bfloat16"] = seconds(load(options.checkpoint, torch.bfloat16), options.length)
    return {
        "machine": describe(),
        "prompts": options.count,
        "seed": options.seed,
        "max_sequence_length": options.length,
        "percent_right": asdict(accuracy(scenes, verdicts)),
        "percent_all_right_by_shape": accuracy_by(scenes, verdicts, "shape"),
        "percent_all_right_by_size": accuracy_by(scenes, verdicts, "size"),
        "seconds_a_picture": {name: round(value, 3) for name, value in speed.items()},
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    names = [field.name for field in fields(Accuracy)]
    right = result["percent_right"]
    machine = result["machine"]
    speed = ", ".join(f"{value:.2f} s in {name}" for name, value in result["seconds_a_picture"].items())
    groups = [*result["percent_all_right_by_shape"].items(), *result["percent_all_right_by_size"].items()]
    return "\n".join(
        (
            "| " + " | ".join((*names[:-1], "all five")) + " |",
            "|" + " ---: |" * len(names),
            "| " + " | ".join(f"{right[name]:.1f} %" for name in names) + " |",
            "",
            f"{result['prompts']} random full prompts (seed {result['seed']}), 28 steps, 128×128, float32, "
            f"`max_sequence_length={result['max_sequence_length']}`.",
            "",
            "All five right, by shape and by size: " + ", ".join(f"{name} {value:.1f} %" for name, value in groups),
            "",
            f"One picture, median: {speed}.",
            f"Machine: {machine['cores']} cores, {machine['processor']}, torch {machine['torch']}.",
        )
    )


def write_card(card: Path, text: str) -> None:
    """Replaces the figures between the markers of the model card. Raises ValueError where a marker is missing."""
    content = card.read_text()
    if BEGIN not in content or END not in content:
        raise ValueError(f"{card} has no figures section: put the lines {BEGIN} and {END} where it belongs")
    before, after = content.split(BEGIN)[0], content.split(END)[1]
    card.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shapes", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--length", type=int, default=32, help="max_sequence_length, the padded length of T5's input")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--card", action="store_true", help="put the figures into the checkpoint's README.md")
    options = parser.parse_args()
    result = measure(options)
    text = table(result)
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    if options.card:
        write_card(options.checkpoint / "README.md", text)


if __name__ == "__main__":
    main()
