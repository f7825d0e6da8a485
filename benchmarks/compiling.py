"""Measure compilation: ``python -m safelight.benchmarks.compiling``.

A mid-size FLUX of random weights is drawn by plain diffusers and by a worker's batcher, each eager and compiled, in
processes of their own. Compilers start with an empty cache, and then again with what the first start left there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from .machine import describe

RESULTS = Path(__file__).parent / "results"
PROMPT = "a red circle"
TOKENS = 64
"""Tokens of the prompt, padded; both sides have defaults of their own."""

VARIANTS = ("diffusers", "safelight", "diffusers compiled", "safelight compiled")


def draw_by_diffusers(model: Path, options: argparse.Namespace, *, compiled: bool) -> Callable[[int], Any]:
    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=getattr(torch, options.dtype))
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        pipeline.transformer.compile_repeated_blocks(fullgraph=True)

    def draw(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        size = {"width": options.side, "height": options.side, "num_inference_steps": options.steps}
        size["max_sequence_length"] = TOKENS
        return pipeline(PROMPT, **size, generator=generator, output_type="pt").images

    return draw


def draw_by_safelight(model: Path, options: argparse.Namespace, *, compiled: bool) -> Callable[[int], Any]:
    """The worker's model, batcher and compiler, without the processes around them."""
    from safelight.protocol.config import Config
    from safelight.protocol.generation import Generate, Sample
    from safelight.worker.forward.batcher import Batcher
    from safelight.worker.forward.resources import ForwardResources
    from safelight.worker.model.model import load_model
    from safelight.worker.parallel.mesh import Mesh
    from safelight.worker.rank.compilation import new_compiler
    from safelight.worker.requests.sample import SampleRun

    config = Config(model=str(model), dtype=options.dtype, device="cpu", compile="on" if compiled else "off")
    loaded = load_model(config)
    compiler = new_compiler(loaded, config, Mesh())
    batcher = Batcher(max_batch=16, max_tokens=65536, resources=ForwardResources(compiled=compiler))

    def draw(seed: int) -> Any:
        size = {"width": options.side, "height": options.side, "num_inference_steps": options.steps}
        tokens = {"max_sequence_length": TOKENS}
        request = Generate(request_id=str(seed), samples=[Sample(PROMPT, seed)], extra=tokens, **size)
        run = SampleRun(loaded, request, 0, lambda *_: None, lambda _: None)
        batcher.start(run.coroutine)
        while batcher.busy:
            batcher.step()
        if run.coroutine.error is not None:
            raise run.coroutine.error
        if compiler is not None:
            compiler.wait()
        return run.coroutine.result

    return draw


def measure(variant: str, model: Path, options: argparse.Namespace) -> dict[str, float]:
    """In this process: seconds until the first picture and all graphs are there, then of each further picture."""
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    make = draw_by_diffusers if variant.startswith("diffusers") else draw_by_safelight
    draw = make(model, options, compiled=variant.endswith("compiled"))
    began, cpu = time.perf_counter(), _cpu()
    draw(0)
    first, first_cpu = time.perf_counter() - began, _cpu() - cpu
    draw(1)
    times = [_cpu_seconds(partial(draw, seed)) for seed in range(2, 2 + options.pictures)]
    return {"first_s": first, "first_cpu_s": first_cpu, "picture_cpu_s": min(times)}


def _cpu() -> float:
    """CPU seconds of this process and of the compilers that it has run."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _cpu_seconds(function: Callable[[], Any]) -> float:
    before = time.process_time()
    function()
    return time.process_time() - before


def apart(variant: str, model: Path, cache: Path, options: argparse.Namespace) -> dict[str, float]:
    """:func:`measure` in a new process, with its compiler's cache in ``cache``."""
    command = [sys.executable, "-m", "safelight.benchmarks.compiling", "--variant", variant, "--model", str(model)]
    command += [f"--{name}={getattr(options, name)}" for name in ("dtype", "side", "steps", "pictures")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def compare(options: argparse.Namespace) -> dict[str, Any]:
    from safelight.formats.model_names import resolve_model

    from .models import save_mid_size

    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = save_mid_size(Path(str(resolve_model("shapes"))), Path(scratch) / "mid-size")
        for variant in VARIANTS[:2]:
            rows[variant] = apart(variant, model, Path(scratch), options)
        with ThreadPoolExecutor() as pool:  # the two compilers side by side, on a machine with two cores
            for cache in ("cold", "warm"):
                runs = {
                    variant: pool.submit(apart, variant, model, Path(scratch, variant.replace(" ", "-")), options)
                    for variant in VARIANTS[2:]
                }
                for variant, run in runs.items():
                    rows[f"{variant}, {cache} cache"] = run.result()
                    print(variant, cache, run.result(), flush=True)
    sizes = {name: getattr(options, name) for name in ("dtype", "side", "steps", "pictures")}
    return {"machine": describe(), "threads": 1, **sizes, "rows": rows}


def table(found: dict[str, Any]) -> str:
    plain = found["rows"]["diffusers"]["picture_cpu_s"]
    lines = [
        "# Compilation",
        "",
        f"A random FLUX of 42 M parameters, {found['side']} × {found['side']}, {found['steps']} steps, "
        f"{found['dtype']}, one thread of {found['machine']['processor']}; torch {found['machine']['torch']}. "
        "CPU seconds, because other programs used the machine; a picture's are the least of "
        f"{found['pictures']}. *First* has the first picture and the compilation of all graphs, with the compilers' "
        "processes.",
        "",
        "| | first, CPU s | a picture, CPU s | pictures beside plain diffusers |",
        "|---|---|---|---|",
    ]
    for name, row in found["rows"].items():
        ratio = plain / row["picture_cpu_s"]
        lines.append(f"| {name} | {row['first_cpu_s']:.1f} | {row['picture_cpu_s']:.2f} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=5)
    parser.add_argument("--variant", choices=VARIANTS, help="measure this one alone, in this process")
    parser.add_argument("--model", type=Path)
    options = parser.parse_args(arguments)
    if options.variant is not None:
        print(json.dumps(measure(options.variant, options.model, options)))
        return
    found = compare(options)
    (RESULTS / "compiling.json").write_text(json.dumps(found, indent=2) + "\n")
    (RESULTS / "compiling.md").write_text(table(found))


if __name__ == "__main__":
    main()
