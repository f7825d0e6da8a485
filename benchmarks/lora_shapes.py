"""How the embedded adapters draw: their styles, and what they cost in prompt-following; plain diffusers and peft.

`python -m safelight.benchmarks.lora_shapes` draws the same prompts from the same noise with no adapter, with each, and
with both, and writes `benchmarks/results/lora-shapes.json` and `.md`. Beside them stand scenes rendered in the style
and passed through the model's autoencoder, which no adapter can beat. `--picture` draws a few prompts instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from safelight.benchmarks.machine import describe
from safelight.benchmarks.serving import SHAPES
from safelight.formats.model_names import EMBEDDED_ADAPTERS, embedded_adapter
from safelight.shapes import Scene, caption, sample_scenes
from safelight.shapes.scene import SIZES
from safelight.shapes.style_judge import StyleVerdict, judge_style
from safelight.shapes.styles import render_styled
from safelight.shapes.train.look import draw, sheet

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BATCH = 25

Strengths = Mapping[str, float]
"""Adapter name to its strength."""

SETTINGS: Mapping[str, Strengths] = {
    "none": {},
    "outlined": {"outlined": 1.0},
    "striped": {"striped": 1.0},
    "outlined 1.0, striped 0.7": {"outlined": 1.0, "striped": 0.7},
    "outlined 1.0, striped 1.0": {"outlined": 1.0, "striped": 1.0},
}

SHOWN = ("none", "outlined", "striped", "outlined 1.0, striped 0.7")
"""The columns of the picture."""

PICTURED = (
    Scene("red", "heart", "large", "center", "white"),
    Scene("yellow", "star", "large", "top left", "black"),
    Scene("white", "circle", "medium", "bottom right", "purple"),
    Scene("blue", "square", "large", "bottom left", "orange"),
    Scene("green", "triangle", "medium", "center", "white"),
    Scene("black", "cross", "large", "top right", "yellow"),
)


def load(folder: Path | None) -> FluxPipeline:
    """The embedded model in float32 with every adapter loaded: the embedded ones, or what a training run left."""
    pipeline = FluxPipeline.from_pretrained(SHAPES)
    pipeline.set_progress_bar_config(disable=True)
    for name in EMBEDDED_ADAPTERS:
        path = embedded_adapter(name) if folder is None else folder / name / "pytorch_lora_weights.safetensors"
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    return pipeline


def use(pipeline: FluxPipeline, strengths: Strengths) -> None:
    """Draws from now on with these adapters and no others."""
    if strengths:
        pipeline.enable_lora()
        pipeline.set_adapters(list(strengths), list(strengths.values()))
    else:
        pipeline.disable_lora()


def drawn(pipeline: FluxPipeline, scenes: Sequence[Scene], seed: int) -> Iterator[NDArray[np.float32]]:
    """One picture a scene, [128, 128, 3] in [0, 1]."""
    for start in range(0, len(scenes), BATCH):
        yield from draw(pipeline, [caption(scene) for scene in scenes[start : start + BATCH]], seed + start)


@torch.no_grad()
def passed_through(vae: AutoencoderKL, pictures: Tensor) -> Iterator[Tensor]:
    """Pictures [B, 3, 128, 128] as the autoencoder gives them back, one by one."""
    for part in torch.split(pictures, BATCH):
        decoded = vae.decode(vae.encode(part * 2 - 1).latent_dist.mean).sample
        yield from (decoded / 2 + 0.5).clamp(0, 1)


def summary(scenes: Sequence[Scene], verdicts: Sequence[StyleVerdict]) -> dict[str, Any]:
    """Quartiles of both scores, their medians by size, and percentages of pictures that show what was asked."""
    right = [verdict.shows.right(scene) for scene, verdict in zip(scenes, verdicts, strict=True)]
    found: dict[str, Any] = {
        "percent_right": {name: percent(one[name] for one in right) for name in right[0]},
        "percent_all_right": percent(all(one.values()) for one in right),
    }
    for style in EMBEDDED_ADAPTERS:
        scores = [getattr(verdict, style) for verdict in verdicts]
        by_size = {size: [s for s, scene in zip(scores, scenes, strict=True) if scene.size == size] for size in SIZES}
        found[style] = {
            "quartiles": [round(value, 3) for value in statistics.quantiles(scores, n=4)],
            "median_by_size": {size: round(statistics.median(group), 3) for size, group in by_size.items() if group},
        }
    return found


def percent(outcomes: Iterable[bool]) -> float:
    return round(100 * statistics.mean(outcomes), 1)


def measure(pipeline: FluxPipeline, count: int, seed: int) -> dict[str, Any]:
    """Setting to its summary, and the same of rendered scenes."""
    scenes = sample_scenes(count, torch.Generator().manual_seed(seed))
    found: dict[str, Any] = {"adapters": {}, "rendered": {}}
    for name, strengths in SETTINGS.items():
        use(pipeline, strengths)
        verdicts = [judge_style(picture) for picture in drawn(pipeline, scenes, seed * 1_000_000)]
        found["adapters"][name] = summary(scenes, verdicts)
        print(row(name, found["adapters"][name]), flush=True)
    for styles in ((), ("outlined",), ("striped",), ("outlined", "striped")):
        pictures = passed_through(pipeline.vae, render_styled(scenes, styles))
        name = " and ".join(styles) or "plain"
        found["rendered"][name] = summary(scenes, [judge_style(picture) for picture in pictures])
        print(row(name, found["rendered"][name]), flush=True)
    return found


def row(name: str, found: Mapping[str, Any]) -> str:
    """One line of the table."""
    scores = [found[style]["quartiles"] for style in EMBEDDED_ADAPTERS]
    cells = [name, *(f"{middle:.2f} ({low:.2f} to {high:.2f})" for low, middle, high in scores)]
    cells += [f"{value:.0f}" for value in (*found["percent_right"].values(), found["percent_all_right"])]
    return "| " + " | ".join(cells) + " |"


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    attributes = list(result["adapters"]["none"]["percent_right"])
    header = ["", "outlined", "striped", *(f"{name} %" for name in attributes), "all five %"]
    rule = "|---|---|---|" + "---:|" * (len(attributes) + 1)
    sizes = [
        f"- {name}: "
        + "; ".join(
            f"{style} " + ", ".join(f"{size} {value:.2f}" for size, value in found[style]["median_by_size"].items())
            for style in EMBEDDED_ADAPTERS
        )
        for name, found in result["adapters"].items()
    ]
    return "\n".join(
        (
            f"Machine: {json.dumps(result['machine'])}",
            "",
            f"{result['prompts']} random full prompts (seed {result['seed']}), 28 steps, 128×128, float32; the same",
            "prompts and noise in every row. A score is in [0, 1]: its median, and the middle half of the pictures.",
            "The other columns are what the judge reads as asked.",
            "",
            "| " + " | ".join(header) + " |",
            rule,
            *(row(name, found) for name, found in result["adapters"].items()),
            "",
            "The same scenes, rendered in the style and passed through the model's autoencoder, which is the limit:",
            "",
            "| " + " | ".join(header) + " |",
            rule,
            *(row(name, found) for name, found in result["rendered"].items()),
            "",
            "Medians of the scores by the size of the shape:",
            "",
            *sizes,
            "",
        )
    )


def save_picture(pipeline: FluxPipeline, path: Path, seed: int) -> None:
    """A row for each of `PICTURED`, a column for each of `SHOWN`."""
    columns = []
    for name in SHOWN:
        use(pipeline, SETTINGS[name])
        columns.append(draw(pipeline, [caption(scene) for scene in PICTURED], seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = np.stack(columns, axis=1).reshape(-1, *columns[0].shape[1:])
    sheet(pictures, len(SHOWN)).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, help="output of a training run (default: the embedded ones)")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, help="draw only this picture")
    options = parser.parse_args()
    pipeline = load(options.adapters)
    if options.picture is not None:
        save_picture(pipeline, options.picture, options.seed)
        return
    measured = measure(pipeline, options.count, options.seed)
    result = {"machine": describe(), "prompts": options.count, "seed": options.seed, **measured}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "lora-shapes.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "lora-shapes.md").write_text(table(result))


if __name__ == "__main__":
    main()
