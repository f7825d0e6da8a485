"""One GPU, unattended, in a few minutes: full-size models with random weights, served and beside plain diffusers.

``python -m safelight.benchmarks.gpu [--minutes 7.5]`` measures FLUX.1-dev, then Z-Image, Wan 2.1 and Qwen-Image, then
FLUX.1-dev compiled, and writes each figure to ``benchmarks/results/gpu.json`` and ``gpu.md`` as soon as it is measured,
so that nothing is lost when the run is stopped. A stage that would not fit into the minutes left is skipped; ``--only``
runs some of the parts. A stage that fails or takes three times what it needs is recorded with its error, and the next
one runs. ``--dry`` takes tiny models on the CPU through the stages that need no CUDA.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from safelight.benchmarks.full_size import MODELS, FullSize, built, saved
from safelight.benchmarks.gpu_diffusers import Plain, copy_speeds
from safelight.benchmarks.gpu_run import Figures, Run
from safelight.benchmarks.gpu_serving import Served

RESULTS = Path(__file__).resolve().parent / "results"
IN_MEMORY = Path("/dev/shm")
LARGEST_CHECKPOINT = 48 * 10**9


NEEDS_S = {
    "flux": {"diffusers": 30, "checkpoint": 35, "copies": 5, "served": 90},
    "z-image": {"diffusers": 15, "checkpoint": 14, "served": 40},
    "wan": {"diffusers": 18, "checkpoint": 10, "served": 55},
    "qwen-image": {"diffusers": 25, "checkpoint": 45, "served": 65},
    "flux-compiled": {"checkpoint to compile": 60, "served compiled": 100, "diffusers compiled": 90},
}
"""Seconds that each stage of each part is expected to take on an H200, in the order in which they run. All parts but
the last fit into the minutes of a run."""


def measure(run: Run, part: str, directory: Path, *, dry: bool) -> None:
    """Every stage of ``part``, whose checkpoint is made in ``directory`` and removed at the end."""
    try:
        (_measure_compiled if part == "flux-compiled" else _measure_model)(run, part, directory, dry)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _measure_model(run: Run, name: str, directory: Path, dry: bool) -> None:
    model, needs_s = MODELS[name], NEEDS_S[name]
    device, dtype = _placed(dry)
    output = model.tiny_output if dry else model.output
    pipeline: DiffusionPipeline | None = None

    def diffusers() -> Figures:
        nonlocal pipeline
        pipeline = built(model, device, dtype, tiny=dry)
        yield from Plain(pipeline, output).seconds()

    def checkpoint() -> Figures:
        assert pipeline is not None
        yield {"gb": saved(pipeline, directory)}

    run.stage(name, "diffusers", needs_s["diffusers"], diffusers)
    if pipeline is None or not run.stage(name, "checkpoint", needs_s["checkpoint"], checkpoint):
        return
    pipeline = None
    _free_memory()
    if "copies" in needs_s:
        run.stage(name, "copies", needs_s["copies"], lambda: copy_speeds(device.type, 2**24 if dry else 2**30))
    _serve(run, model, Served(directory, device.type, output), needs_s["served"], dry=dry)


def _serve(run: Run, model: FullSize, served: Served, needs_s: float, *, dry: bool) -> None:
    """Served with CUDA graphs, or without them if that fails; FLUX with all that it must reach."""
    whole = model.name == "flux"
    graphs = ("--piecewise-cuda-graph", "on", *(_enforced(served) if whole else ()))
    with_graphs = partial(served.measured, graphs, batching=whole, updates=whole, counts="graph_replays")
    without = partial(served.measured, (), batching=whole, updates=whole, counts=None)
    if dry or not run.stage(model.name, "served with CUDA graphs", needs_s, with_graphs):
        run.stage(model.name, "served", needs_s, without)


def _measure_compiled(run: Run, part: str, directory: Path, dry: bool) -> None:
    """FLUX's blocks compiled, by the server and by diffusers."""
    model, needs_s = MODELS["flux"], NEEDS_S[part]
    device, dtype = _placed(dry)
    output = model.tiny_output if dry else model.output
    served = Served(directory, device.type, output)
    options = ("--compile", "on", "--compile-sizes", _size(served))

    def checkpoint() -> Figures:
        yield {"gb": saved(built(model, device, dtype, tiny=dry), directory)}

    def compiled() -> Figures:
        yield from Plain.loaded(directory, device, dtype, output).compiled_seconds("eager" if dry else "inductor")

    stages: dict[str, Callable[[], Figures]] = {"checkpoint to compile": checkpoint}
    if not dry:  # compiling for a CPU takes minutes
        counts = "compiled_block_calls"
        stages["served compiled"] = partial(served.measured, options, batching=False, updates=False, counts=counts)
    stages["diffusers compiled"] = compiled
    for stage, measured in stages.items():
        if not run.stage(model.name, stage, needs_s[stage], measured) and measured is checkpoint:
            return
        _free_memory()


def _placed(dry: bool) -> tuple[torch.device, torch.dtype]:
    return (torch.device("cpu"), torch.float32) if dry else (torch.device("cuda"), torch.bfloat16)


def _enforced(served: Served) -> tuple[str, ...]:
    """Options with which every forward of the stage has a graph, or fails."""
    small = [f"{_size(served, part=2)}x{outputs}" for outputs in (1, 2, 4, 8)]
    sizes = ",".join([_size(served), *small])
    return "--enforce-piecewise-cuda-graph", "--cuda-graph-sizes", sizes, "--cuda-graph-mb", "16384"


def _size(served: Served, part: int = 1) -> str:
    return f"{served.output['width'] // part}x{served.output['height'] // part}"


def _free_memory() -> None:
    """Give the GPU's memory back to the servers that come next; pipelines refer to themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _roomy() -> Path:
    """A directory in memory if there is room, because a disk may take minutes for a checkpoint."""
    places = [place for place in (IN_MEMORY, Path(tempfile.gettempdir())) if place.is_dir()]
    free = {place: shutil.disk_usage(place).free for place in places}
    return next((place for place in places if free[place] > LARGEST_CHECKPOINT), max(places, key=free.__getitem__))


_ONLY = f"the parts to run, in this order: {', '.join(NEEDS_S)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PART", nargs="+", choices=list(NEEDS_S), default=list(NEEDS_S), help=_ONLY)
    parser.add_argument("--minutes", type=float, default=7.5, help="after which every stage is stopped")
    parser.add_argument(
        "--directory",
        type=Path,
        help=f"where checkpoints are made, up to 48 GB at a time ({IN_MEMORY}, if it has room)",
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU: to see that it runs")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry runs the same stages with tiny models on the CPU")
    if options.dry and options.results == RESULTS:
        parser.error("a dry run measures nothing worth keeping: give --results another directory")
    run = Run(options.minutes, options.results, {"minutes": options.minutes, "dry": options.dry})
    directory = options.directory or (None if options.dry else _roomy())
    with tempfile.TemporaryDirectory(dir=directory, prefix="safelight-full-size-") as made:
        for part in options.only:
            measure(run, part, Path(made, part), dry=options.dry)


if __name__ == "__main__":
    main()
