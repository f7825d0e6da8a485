"""One GPU, unattended, in a few minutes: full-size models with random weights, served and beside plain diffusers.

``python -m safelight.benchmarks.gpu [--minutes 8]`` measures FLUX.1-dev, then Z-Image, Wan 2.1 and Qwen-Image, and
writes ``benchmarks/results/gpu.json`` and ``gpu.md`` after every stage, so that nothing is lost when it is ended. A
stage that would not fit into the minutes left is skipped, one that fails is recorded with its error, and the next one
runs. ``--dry`` takes tiny models on the CPU through the stages that need no CUDA.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from safelight.benchmarks.full_size import MODELS, FullSize, built, saved
from safelight.benchmarks.gpu_diffusers import Plain, copy_speeds
from safelight.benchmarks.gpu_serving import Served, StartFailed
from safelight.benchmarks.machine import describe

RESULTS = Path(__file__).resolve().parent / "results"
GRAPHS = ("--piecewise-cuda-graph", "on")
COMPILED = ("--compile", "on")


class Run:
    """The stages of one run, their results, and the time that is left for them."""

    def __init__(self, minutes: float, results: Path, options: dict[str, Any]) -> None:
        self._ends = time.monotonic() + 60 * minutes
        self._results = results
        self.found: dict[str, Any] = {"machine": describe(), "options": options, "models": {}}

    def stage(self, model: str, name: str, needs_s: float, measure: Callable[[], dict[str, Any]]) -> bool:
        """Run one stage and keep what it found; false if it failed or was skipped."""
        stages = self.found["models"].setdefault(model, {})
        left_s, began = self._ends - time.monotonic(), time.monotonic()
        if left_s < needs_s:
            stages[name] = {"skipped": f"needs about {needs_s:.0f} s, and {max(0.0, left_s):.0f} were left"}
        else:
            try:
                stages[name] = measure()
            except (RuntimeError, OSError, ValueError, StartFailed) as error:  # the other stages are worth having
                stages[name] = {"error": f"{type(error).__name__}: {error}"}
        stages[name]["stage_s"] = round(time.monotonic() - began, 2)
        print(model, name, json.dumps(stages[name]), flush=True)
        self._write()
        return "error" not in stages[name] and "skipped" not in stages[name]

    def _write(self) -> None:
        self._results.mkdir(parents=True, exist_ok=True)
        (self._results / "gpu.json").write_text(json.dumps(self.found, indent=2) + "\n")
        (self._results / "gpu.md").write_text(table(self.found))


def measure(run: Run, model: FullSize, directory: Path, *, dry: bool) -> None:
    """Every stage of one model, whose checkpoint is made in ``directory`` and removed at the end."""
    device, dtype = (torch.device("cpu"), torch.float32) if dry else (torch.device("cuda"), torch.bfloat16)
    output = model.tiny_output if dry else model.output
    whole = model.name == "flux"
    plain: list[Plain] = []

    def build() -> dict[str, Any]:
        pipeline = built(model, device, dtype, tiny=dry)
        plain.append(Plain(pipeline, output))
        return {"gigabytes": saved(pipeline, directory)}

    try:
        if not run.stage(model.name, "checkpoint", 60 if whole else 40, build):
            return
        run.stage(model.name, "diffusers", 30, plain[0].seconds)
        if whole:
            backend = "eager" if dry else "inductor"
            run.stage(model.name, "diffusers compiled", 120, lambda: plain[0].compiled_seconds(backend))
        plain.clear()
        if not dry:
            torch.cuda.empty_cache()
        _serve(run, model, Served(directory, device.type, output), whole=whole, dry=dry)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _serve(run: Run, model: FullSize, served: Served, *, whole: bool, dry: bool) -> None:
    def all_of_it(*options: str) -> Callable[[], dict[str, Any]]:
        return lambda: served.measured(options, batching=whole, updates=whole)

    if whole:
        run.stage(model.name, "copies", 10, lambda: copy_speeds(served.device, 2**24 if dry else 2**30))
    enforced = _enforced(served) if whole else ()
    graphs = not dry and run.stage(model.name, "served with CUDA graphs", 60, all_of_it(*GRAPHS, *enforced))
    if not graphs:
        run.stage(model.name, "served", 60, all_of_it())
    if whole and not dry:
        run.stage(model.name, "served compiled", 120, lambda: served.measured(COMPILED, batching=False, updates=False))


def _enforced(served: Served) -> tuple[str, ...]:
    """Options with which every forward of the stage has a graph, or fails."""
    width, height = served.output["width"], served.output["height"]
    small = [f"{width // 2}x{height // 2}x{outputs}" for outputs in (1, 2, 4, 8)]
    sizes = ",".join([f"{width}x{height}", *small])
    return "--enforce-piecewise-cuda-graph", "--cuda-graph-sizes", sizes, "--cuda-graph-mb", "16384"


def table(found: dict[str, Any]) -> str:
    """The results as Markdown: one row for each figure of each stage."""
    lines = [f"Machine: {json.dumps(found['machine'])}", "", "| model | stage | figure | value |", "|---|---|---|---|"]
    for model, stages in found["models"].items():
        for stage, figures in stages.items():
            for name, value in figures.items():
                shown = f"{value:.3g}" if isinstance(value, float) else str(value)
                lines.append(f"| {model} | {stage} | {name} | {shown.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no stage begins that would not fit")
    parser.add_argument("--directory", type=Path, help="where checkpoints are made, up to 48 GB at a time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU: to see that it runs")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry runs the same stages with tiny models on the CPU")
    if options.dry and options.results == RESULTS:
        parser.error("a dry run measures nothing worth keeping: give --results another directory")
    run = Run(options.minutes, options.results, {"minutes": options.minutes, "dry": options.dry})
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="safelight-full-size-") as directory:
        for name in options.models:
            measure(run, MODELS[name], Path(directory, name), dry=options.dry)


if __name__ == "__main__":
    main()
