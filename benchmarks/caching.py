"""The savings of step cache, guidance pairing and prompt cache, and the errors of the step cache.

`python -m safelight.benchmarks.caching` prints tables and writes `results/caching.json` and `results/caching.md`. It
runs in one process and one thread, and counts CPU seconds of the process, which other work disturbs least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from safelight.benchmarks.caching_models import save_guided_clips, save_long_text
from safelight.benchmarks.drawing import draw, loaded
from safelight.benchmarks.machine import describe
from safelight.protocol.forward_options import ForwardOptions
from safelight.protocol.generation import Generate, Sample
from safelight.protocol.step_caching import THRESHOLDS, CacheRule
from safelight.shapes import caption, judge, sample_scenes
from safelight.worker.forward.prompt_cache import PromptCache
from safelight.worker.model.model import Model

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STEPS = 28
TRIED: dict[CacheRule, Sequence[float]] = {
    "easycache": (0.025, 0.05, 0.1, 0.15, 0.2, 0.3),
    "teacache": (0.05, 0.1, 0.2, 0.3),
}
PROMPT = "a red circle moving right on a white background"


def requests(prompts: Sequence[str], seed: int, **fields: Any) -> list[Generate]:
    return [
        Generate(request_id=str(i), samples=[Sample(prompt, seed + i)], num_inference_steps=STEPS, **fields)
        for i, prompt in enumerate(prompts)
    ]


def step_cache(count: int, seed: int) -> dict[str, Any]:
    """The embedded model with each rule and threshold: computed forwards, seconds, errors, and the judge's accuracy."""
    model = loaded(ROOT / "assets" / "shapes")
    scenes = sample_scenes(count, torch.Generator().manual_seed(seed))
    asked = requests([caption(scene) for scene in scenes], seed * 1_000_000)
    draw(model, asked[:16], ForwardOptions())  # allocates and compiles what every run needs
    without = draw(model, asked, ForwardOptions())
    rows = []
    for rule, thresholds in TRIED.items():
        for limit in (0.0, *thresholds) if not rows else thresholds:
            drawn = draw(model, asked, ForwardOptions(step_cache=f"{limit:g}", step_cache_rule=rule))
            pairs = list(zip(drawn.outputs, without.outputs, strict=True))
            right = [judge(one).matches(scene) for one, scene in zip(drawn.outputs, scenes, strict=True)]
            rows.append(
                {
                    "rule": rule if limit else "off",
                    "threshold": limit,
                    "forwards_a_picture": round(STEPS - drawn.skipped / count, 2),
                    "cpu_speedup": round(without.cpu_s / drawn.cpu_s, 2),
                    "mean_error": round(statistics.mean(float((a - b).abs().mean()) for a, b in pairs), 5),
                    "judge_percent": round(100 * statistics.mean(right), 1),
                }
            )
            print(rows[-1], flush=True)
    return {"pictures": count, "seed": seed, "steps": STEPS, "rows": rows, "alone": alone(model, asked[:12])}


def alone(model: Model, asked: Sequence[Generate], rounds: int = 3) -> dict[str, float]:
    """The speed-up of one request at a time, by the names of thresholds; off and on by turns."""
    found = {}
    for name in ("balanced", "fast"):
        ratios = []
        for _ in range(rounds):
            seconds = {
                cache: draw(model, asked, ForwardOptions(step_cache=cache), together=1).cpu_s for cache in ("off", name)
            }
            ratios.append(seconds["off"] / seconds[name])
        found[name] = round(statistics.median(ratios), 2)
    return found


def guidance_pairing(scratch: Path, rounds: int) -> dict[str, Any]:
    """Clips of models that call their denoiser twice a step, with pairing and without by turns."""
    models = {
        "tiny (2 blocks, width 64)": save_guided_clips(
            ROOT / "assets" / "shapes-video", scratch / "tiny", layers=2, heads=2
        ),
        "embedded (6 blocks, width 192)": ROOT / "assets" / "shapes-video",
        "mid-size (4 blocks, width 768)": save_guided_clips(
            ROOT / "assets" / "shapes-video", scratch / "mid", layers=4, heads=24
        ),
    }
    found = []
    for name, directory in models.items():
        model = loaded(directory)
        for frames, size, together in ((1, 32, 1), (1, 64, 1), (17, 64, 1), (1, 64, 4)):
            asked = requests([PROMPT] * together, 0, num_frames=frames, width=size, height=size, output_format="pt")
            draw(model, asked, ForwardOptions())
            ratios: dict[str, list[float]] = {"cpu": [], "wall": []}
            error = 0.0
            for _ in range(rounds):
                cache = PromptCache(2**28)
                off, on = (
                    draw(model, asked, ForwardOptions(guidance_pairing=pairs), cache, together=together)
                    for pairs in ("off", "on")
                )
                ratios["cpu"].append(off.cpu_s / on.cpu_s)
                ratios["wall"].append(off.wall_s / on.wall_s)
                error = max(error, *(float((a - b).abs().max()) for a, b in zip(on.outputs, off.outputs, strict=True)))
            found.append(
                {
                    "model": name,
                    "clip": f"{frames} × {size}²",
                    "at_once": together,
                    "cpu_speedup": round(statistics.median(ratios["cpu"]), 2),
                    "wall_speedup": round(statistics.median(ratios["wall"]), 2),
                    "largest_difference": float(f"{error:.1e}"),
                }
            )
            print(found[-1], flush=True)
    return {"rounds": rounds, "rows": found}


def prompt_cache(scratch: Path, rounds: int) -> dict[str, Any]:
    """The time from a request's start to its first denoising step, for a new prompt and for a known one."""
    model = loaded(save_long_text(ROOT / "assets" / "shapes", scratch / "long-text"))
    cache, options = PromptCache(2**28), ForwardOptions()
    ratios, seconds = [], []
    for index in range(rounds + 1):
        sample = Sample(f"a red circle number {index}", index)
        asked = Generate(request_id="a", samples=[sample], num_inference_steps=1, extra={"max_sequence_length": 512})
        cold, warm = (draw(model, [asked], options, cache).encode_s for _ in range(2))
        ratios.append(cold / warm)
        seconds.append((cold, warm))
    cold, warm = (statistics.median(column) for column in zip(*seconds[1:], strict=True))
    return {
        "text_encoder_parameters": sum(p.numel() for p in model.pipeline.text_encoder_2.parameters()),
        "cold_ms": round(1000 * cold, 2),
        "warm_ms": round(1000 * warm, 2),
        "speedup": round(statistics.median(ratios[1:]), 1),
    }


_CACHE_TEXT = """\
The embedded model, {steps} steps, {pictures} random prompts (seed {seed}), 16 requests at a time. The error is the
mean of a pixel's, in [0, 1], against the same requests without a cache. Accuracy is the share of pictures that the
judge finds right in all five attributes. The thresholds with names were chosen from this table. Each row's speed-up is
against one run at the beginning, so it is as rough as the row `off` says; those below the table are taken by turns.

| rule | threshold | forwards a picture | speed-up | mean error | judge |
|---|---:|---:|---:|---:|---:|"""

_PAIRING_TEXT = """\
Wan pipelines, {steps} steps; seconds without pairing over seconds with it, by turns, median of {rounds}.

| model | clip | requests at once | CPU | wall | largest difference of a pixel |
|---|---|---:|---:|---:|---:|"""

_PROMPT_TEXT = """\
FLUX with a T5 encoder of {text_encoder_parameters} parameters and 512 tokens, from a request's start to its first step:
{cold_ms} ms with a new prompt, {warm_ms} ms with a known one, {speedup} times faster.
"""


def tables(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine, cached, paired = found["machine"], found["step_cache"], found["guidance_pairing"]
    names = {(rule, value): name for rule, named in THRESHOLDS.items() for name, value in named.items()}
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, one thread, torch {machine['torch']}, float32.",
        "Other work ran on the machine meanwhile, so the ratios are of CPU seconds, within one run.",
        "\n## Step cache\n",
        _CACHE_TEXT.format(**cached),
    ]
    for row in cached["rows"]:
        name = names.get((row["rule"], row["threshold"]))
        lines.append(
            f"| {row['rule']} | {row['threshold']:g}{f' (`{name}`)' if name else ''} | {row['forwards_a_picture']} | "
            f"{row['cpu_speedup']} | {row['mean_error']:.5f} | {row['judge_percent']} % |"
        )
    alone = ", ".join(f"`{name}` {ratio}" for name, ratio in cached["alone"].items())
    lines += [
        f"\nWhole requests, one at a time, by easycache and by turns: {alone}.",
        "\n## Guidance pairing\n",
        _PAIRING_TEXT.format(**paired, steps=STEPS),
    ]
    lines += [
        f"| {row['model']} | {row['clip']} | {row['at_once']} | {row['cpu_speedup']} | {row['wall_speedup']} | "
        f"{row['largest_difference']:.0e} |"
        for row in paired["rows"]
    ]
    return "\n".join([*lines, "\n## Prompt cache\n", _PROMPT_TEXT.format(**found["prompt_cache"])])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m safelight.benchmarks.caching", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="pictures for each threshold")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--scratch", type=Path, default=Path("/tmp/safelight-caching"), help="where random models are kept"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "caching.json")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.scratch or Path(temporary)
        found = {
            "machine": describe(),
            "prompt_cache": prompt_cache(scratch, options.rounds),
            "guidance_pairing": guidance_pairing(scratch, options.rounds),
            "step_cache": step_cache(options.count, options.seed),
        }
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    text = tables(found)
    options.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
