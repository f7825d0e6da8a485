"""The savings of step cache, guidance pairing and prompt cache, and their errors.

`python -m safelight.benchmarks.caching` prints tables and writes `results/caching.json` and `results/caching.md`. It
runs in one process and one thread, and counts CPU seconds of the process, which other work disturbs least. `--quick`
takes a few minutes, shows that everything runs, and leaves the results alone. `docs/generate_performance.py` puts the
results into the documentation.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from safelight.benchmarks.caching_models import save_guided_clips, save_long_text
from safelight.benchmarks.caching_tables import tables
from safelight.benchmarks.drawing import Drawn, draw, loaded
from safelight.benchmarks.machine import describe
from safelight.benchmarks.residual_cache import ResidualCaching
from safelight.benchmarks.rounding import rounding
from safelight.protocol.forward_options import ForwardOptions
from safelight.protocol.generation import Generate, Sample
from safelight.protocol.step_caching import CacheRule
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
SECTIONS = ("prompt_cache", "guidance_pairing", "rounding", "step_cache")
TRIED_WITH_RESIDUALS = (0.025, 0.05, 0.15)
PROMPT = "a red circle moving right on a white background"


def requests(prompts: Sequence[str], seed: int, **fields: Any) -> list[Generate]:
    return [
        Generate(request_id=str(i), samples=[Sample(prompt, seed + i)], num_inference_steps=STEPS, **fields)
        for i, prompt in enumerate(prompts)
    ]


def step_cache(count: int, seed: int, rounds: int) -> dict[str, Any]:
    """The embedded model with each rule and threshold: computed forwards, seconds, errors, and the judge's accuracy."""
    model = loaded(ROOT / "assets" / "shapes")
    scenes = sample_scenes(count, torch.Generator().manual_seed(seed))
    asked = requests([caption(scene) for scene in scenes], seed * 1_000_000)
    draw(model, asked[:16], ForwardOptions())  # allocates and compiles what every run needs
    without = draw(model, asked, ForwardOptions())

    def row(rule: str, limit: float, drawn: Drawn) -> dict[str, Any]:
        pairs = list(zip(drawn.outputs, without.outputs, strict=True))
        right = [judge(one).matches(scene) for one, scene in zip(drawn.outputs, scenes, strict=True)]
        return {
            "rule": rule,
            "threshold": limit,
            "forwards_a_picture": round(STEPS - drawn.skipped / count, 2),
            "cpu_speedup": round(without.cpu_s / drawn.cpu_s, 2),
            "mean_error": round(statistics.mean(float((a - b).abs().mean()) for a, b in pairs), 5),
            "judge_percent": round(100 * statistics.mean(right), 1),
        }

    rows = [row("off", 0.0, draw(model, asked, ForwardOptions(step_cache="off")))]
    for rule, thresholds in TRIED.items():
        for limit in thresholds:
            options = ForwardOptions(step_cache=f"{limit:g}", step_cache_rule=rule)
            rows.append(row(rule, limit, draw(model, asked, options)))
            print(rows[-1], flush=True)
    for limit in TRIED_WITH_RESIDUALS:
        drawn = draw(model, asked, ForwardOptions(), caching=ResidualCaching(limit))
        rows.append(row("easycache, adding the latents' change", limit, drawn))
    return {
        "pictures": count,
        "seed": seed,
        "steps": STEPS,
        "rows": rows,
        "alone": alone(model, asked[:12], rounds),
    }


def alone(model: Model, asked: Sequence[Generate], rounds: int) -> dict[str, float]:
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
    return {"rounds": rounds, "steps": STEPS, "rows": found}


def rounding_of_shared_forwards(count: int) -> dict[str, Any]:
    """How far shared forwards move the pixels of embedded models, beside other rounding."""
    scenes = sample_scenes(count, torch.Generator().manual_seed(0))
    clips = ROOT / "assets" / "shapes-video"
    tried = {
        "embedded, 64²": (ROOT / "assets" / "shapes", requests([caption(scene) for scene in scenes], 0)),
        "embedded video, 64²": (clips, requests([PROMPT] * count, 0, num_frames=1, width=64, height=64)),
        "embedded video, 32²": (clips, requests([PROMPT] * count, 0, num_frames=1, width=32, height=32)),
    }
    rows = []
    for name, (directory, asked) in tried.items():
        rows.append({"model": name} | rounding(directory, asked))
        print(rows[-1], flush=True)
    return {"pictures": count, "steps": STEPS, "rows": rows}


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m safelight.benchmarks.caching", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="pictures for each threshold")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few pictures, one round")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"run these again, of {', '.join(SECTIONS)}"
    )
    parser.add_argument(
        "--scratch", type=Path, default=Path("/tmp/safelight-caching"), help="where random models are kept"
    )
    parser.add_argument(
        "--out", type=Path, help="default: results/caching.json; with --quick, below the scratch folder"
    )
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    quick, scratch = options.quick, options.scratch
    count, rounds = (16, 1) if quick else (options.count, options.rounds)
    out = options.out or (scratch if quick else RESULTS) / "caching.json"
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "prompt_cache": lambda: prompt_cache(scratch, rounds),
        "guidance_pairing": lambda: guidance_pairing(scratch, rounds),
        "rounding": lambda: rounding_of_shared_forwards(2 if quick else 8),
        "step_cache": lambda: step_cache(count, options.seed, rounds),
    }
    found: dict[str, Any] = json.loads(out.read_text()) if options.only else {}
    found |= {"machine": describe()} | {name: sections[name]() for name in options.only or sections}
    out.write_text(json.dumps(found, indent=2) + "\n")
    text = tables(found)
    out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
