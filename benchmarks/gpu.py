"""One GPU, unattended, in a few minutes: full-size models with random weights, served and beside plain diffusers.

``python -m safelight.benchmarks.gpu [--minutes 7.5]`` measures FLUX.1-dev, then Z-Image, Wan 2.1 and Qwen-Image, and
writes each figure to ``benchmarks/results/gpu.json`` and ``gpu.md`` as soon as it is measured, so that nothing is lost
when the run is stopped. A stage that would not fit into the minutes left is skipped; one that fails or takes three
times what it needs is recorded with its error, and the next one runs. ``--dry`` takes tiny models on the CPU through
the stages that need no CUDA.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import tempfile
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


def measure(run: Run, model: FullSize, directory: Path, *, dry: bool) -> None:
    """Every stage of one model, whose checkpoint is made in ``directory`` and removed at the end."""
    device, dtype = (torch.device("cpu"), torch.float32) if dry else (torch.device("cuda"), torch.bfloat16)
    output = model.tiny_output if dry else model.output
    whole = model.name == "flux"

    pipeline: DiffusionPipeline | None = None

    def diffusers() -> Figures:
        nonlocal pipeline
        pipeline = built(model, device, dtype, tiny=dry)
        yield from Plain(pipeline, output).seconds()

    def checkpoint() -> Figures:
        assert pipeline is not None
        yield {"gb": saved(pipeline, directory)}

    def compiled() -> Figures:
        yield from Plain.loaded(directory, device, dtype, output).compiled_seconds("eager" if dry else "inductor")

    try:
        run.stage(model.name, "diffusers", 30, diffusers)
        if pipeline is None or not run.stage(model.name, "checkpoint", 50 if whole else 30, checkpoint):
            return
        pipeline = None
        _free_memory()
        _serve(run, model, Served(directory, device.type, output), whole=whole, dry=dry)
        if whole:
            run.stage(model.name, "diffusers compiled", 90, compiled)
            _free_memory()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _serve(run: Run, model: FullSize, served: Served, *, whole: bool, dry: bool) -> None:
    def measured(*options: str, everything: bool = whole, counts: str | None = None) -> Figures:
        return served.measured(options, batching=everything, updates=everything, counts=counts)

    if whole:
        run.stage(model.name, "copies", 10, lambda: copy_speeds(served.device, 2**24 if dry else 2**30))
    graphs = ("--piecewise-cuda-graph", "on", *(_enforced(served) if whole else ()))
    needs_s = 90 if whole else 60
    if dry or not run.stage(
        model.name, "served with CUDA graphs", needs_s, lambda: measured(*graphs, counts="graph_replays")
    ):
        run.stage(model.name, "served", needs_s, measured)
    if whole and not dry:
        compiled = partial(measured, "--compile", "on", "--compile-sizes", _size(served), counts="compiled_block_calls")
        run.stage(model.name, "served compiled", 100, partial(compiled, everything=False))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
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
        for name in options.models:
            measure(run, MODELS[name], Path(made, name), dry=options.dry)


if __name__ == "__main__":
    main()
