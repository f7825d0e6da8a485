"""Safelight beside plain diffusers and SGLang-Diffusion on a tiny Z-Image: 128², 8 steps, bfloat16.

``python -m safelight.benchmarks.peers [--rounds N] [--sglang FOLDER…]`` measures all of them in one run, one after the
other, because an idle SGLang keeps a core busy. Results: ``benchmarks/results/peers.json`` and ``peers.md``.

SGLang-Diffusion needs other packages than Safelight. ``--sglang`` (or ``SGLANG_PATH``, divided by colons) names the
folders that hold them, which come before the environment's own on its ``PYTHONPATH``; without them its rows are left
out. On a CPU these are: ``sglang==0.5.23`` unpacked, its dependencies (``pip install --no-deps --target``), and
``torchvision`` with a ``sitecustomize.py`` that puts an empty module at ``torchvision._meta_registrations``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import ZImagePipeline

from safelight.benchmarks.machine import describe
from safelight.benchmarks.models import save_tiny_z_image
from safelight.benchmarks.peer_servers import (
    SIDE,
    STEPS,
    Server,
    compiler_cache,
    draw,
    locked,
    prompt,
    running,
    safelight,
    safelight_compiled,
    sglang,
)

RESULTS = Path(__file__).resolve().parent / "results"
PLAIN, PLAIN_COMPILED = "plain diffusers, in process", "plain diffusers, compiled"
SAFELIGHT, SAFELIGHT_COMPILED, LOCKED = "Safelight", "Safelight, --compile on", "an app with a lock"
SGLANG, SGLANG_BATCHING = "SGLang-Diffusion", "SGLang-Diffusion, batching 16"


@dataclass(frozen=True)
class Load:
    """A measurement: CPU milliseconds of all the server's processes for each picture, and how many cores were busy."""

    pictures_per_s: float
    median_latency_s: float
    cpu_ms_per_picture: float
    busy_cores: float


def measure(server: Server, root: psutil.Process, clients: int, pictures: int, numbers: Iterator[int]) -> Load:
    """A closed loop: each client asks again as soon as it was answered."""
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda _: draw(server, next(numbers)), range(2 * clients)))
        cpu, began = cpu_seconds(root), time.perf_counter()
        latencies = list(pool.map(lambda _: draw(server, next(numbers)), range(pictures)))
        seconds, spent = time.perf_counter() - began, cpu_seconds(root) - cpu
    return Load(pictures / seconds, statistics.median(latencies), 1e3 * spent / pictures, spent / seconds)


def cpu_seconds(root: psutil.Process) -> float:
    """CPU seconds that ``root`` and all processes below it have used so far."""
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return float(sum(one.user + one.system for one in times))


def plain(model: Path, threads: int, batch: int, pictures: int, *, compiled: bool) -> Load:
    """The pipeline called in this process with ``batch`` prompts at once."""
    torch.set_num_threads(threads)
    pipeline = ZImagePipeline.from_pretrained(model, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        pipeline.transformer.compile_repeated_blocks(fullgraph=True)
    numbers = count()
    seconds, spent = [], []
    for _ in range(2 + max(2, pictures // batch)):
        asked = [next(numbers) for _ in range(batch)]
        generators = [torch.Generator().manual_seed(number) for number in asked]
        cpu, began = time.process_time(), time.perf_counter()
        arguments = {"width": SIDE, "height": SIDE, "num_inference_steps": STEPS, "guidance_scale": 0.0}
        pipeline([prompt(number) for number in asked], generator=generators, **arguments)
        seconds.append(time.perf_counter() - began)
        spent.append(time.process_time() - cpu)
    latency, used = statistics.median(seconds[2:]), statistics.median(spent[2:])  # the first two warm up
    return Load(batch / latency, latency, 1e3 * used / batch, used / latency)


def plain_elsewhere(model: Path, threads: int, batch: int, pictures: int, *, compiled: bool = False) -> Load:
    """:func:`plain` in a process of its own."""
    environment = os.environ | compiler_cache(model)
    command = [sys.executable, "-m", "safelight.benchmarks.peers", "--plain", str(batch), "--model", str(model)]
    command += ["--threads", str(threads), "--pictures", str(pictures), *(["--compiled"] if compiled else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return Load(**json.loads(done.stdout.splitlines()[-1]))


def fill_compiler_cache(options: argparse.Namespace) -> None:
    """Compile what the rounds need: a process that has compiled itself is slow for a while."""
    for clients in options.clients:
        plain_elsewhere(options.model, options.threads, clients, clients, compiled=True)
    with running(safelight_compiled(options.model, options.threads, {}, options.clients)):
        print("compiled", flush=True)


def run_round(options: argparse.Namespace) -> dict[str, dict[int, Load]]:
    """Every system's measurements by number of clients."""
    model, threads = options.model, options.threads
    found = {
        name: {n: plain_elsewhere(model, threads, n, 6 * n + 18, compiled=compiled) for n in options.clients}
        for name, compiled in ((PLAIN, False), (PLAIN_COMPILED, True))
    }
    environment = dict(options.environment)
    systems = {
        SAFELIGHT: safelight(model, threads, environment),
        SAFELIGHT_COMPILED: safelight_compiled(model, threads, environment, options.clients),
        LOCKED: locked(model, threads),
    }
    if options.sglang:
        systems[SGLANG] = sglang(options.model, options.sglang, batching=False)
        systems[SGLANG_BATCHING] = sglang(options.model, options.sglang, batching=True)
    for name, server in systems.items():
        with running(server) as root:
            numbers = count(1)
            found[name] = {n: measure(server, root, n, 6 * n + 18, numbers) for n in options.clients}
    return found


def medians(rounds: list[dict[str, dict[int, Load]]]) -> list[dict[str, Any]]:
    """A row for each system and number of clients; ratios are taken within each round."""
    rows = []
    for name, of_clients in rounds[0].items():
        for clients in of_clients:
            loads = [one[name][clients] for one in rounds]
            row: dict[str, Any] = {"system": name, "clients": clients}
            row |= {field: statistics.median(asdict(load)[field] for load in loads) for field in asdict(loads[0])}
            row["safelight_is_so_many_times_as_fast"] = statistics.median(
                one[SAFELIGHT][clients].pictures_per_s / one[name][clients].pictures_per_s for one in rounds
            )
            rows.append(row)
    return rows


def table(found: dict[str, Any]) -> str:
    missing = "" if found["options"]["sglang"] else f"\nNot measured, as no folders were given: {SGLANG}.\n"
    rows = "".join(
        f"| {row['system']} | {row['clients']} | {row['pictures_per_s']:.2f} | {row['median_latency_s']:.3f} "
        f"| {row['cpu_ms_per_picture']:.0f} | {row['busy_cores']:.2f} "
        f"| {row['safelight_is_so_many_times_as_fast']:.2f} |\n"
        for row in found["rows"]
    )
    return f"""Machine: {json.dumps(found["machine"])}

A tiny Z-Image, {SIDE}², {STEPS} steps, bfloat16, with a new prompt for each picture. Medians of {len(found["rounds"])}
rounds. Plain diffusers draws as many prompts in one batch. What is compiled are the denoiser's blocks, for these
numbers of rows, from a filled cache. CPU time includes all processes of a system and excludes the
clients.
{missing}
| system | clients | pictures/s | median s | CPU ms a picture | busy cores | Safelight is so many times as fast |
|---|---|---|---|---|---|---|
{rows}"""


def main() -> None:
    options = _options()
    if options.plain:
        load = plain(options.model, options.threads, options.plain, options.pictures, compiled=options.compiled)
        print(json.dumps(asdict(load)))
        return
    fill_compiler_cache(options)
    rounds = []
    for number in range(options.rounds):
        rounds.append(run_round(options))
        rates = {name: [round(load.pictures_per_s, 1) for load in loads.values()] for name, loads in rounds[-1].items()}
        print(f"round {number}: {rates}", flush=True)
    asked = {
        "clients": options.clients,
        "threads": options.threads,
        "sglang": bool(options.sglang),
        "environment": options.environment,
    }
    each = [{name: {n: asdict(load) for n, load in loads.items()} for name, loads in one.items()} for one in rounds]
    found = {"machine": describe(), "options": asked, "rows": medians(rounds), "rounds": each}
    print(table(found))
    if not options.quick:
        (RESULTS / "peers.json").write_text(json.dumps(found, indent=2) + "\n")
        (RESULTS / "peers.md").write_text(table(found))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, and nothing written: to see that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--environment",
        nargs="+",
        default=[],
        type=lambda one: tuple(one.split("=", 1)),
        help="NAME=VALUE for Safelight",
    )
    parser.add_argument("--sglang", nargs="+", default=_folders(), help="folders for SGLang's PYTHONPATH")
    parser.add_argument("--model", type=Path, help="folder of the tiny model, made if missing")
    parser.add_argument("--plain", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--pictures", type=int, default=24, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.rounds = 1 if options.quick else options.rounds
    directory = Path(tempfile.gettempdir()) / "safelight-peers" / "Z-Image-Turbo"
    options.model = save_tiny_z_image(options.model or directory)
    return options


def _folders() -> list[str]:
    return [folder for folder in os.environ.get("SGLANG_PATH", "").split(os.pathsep) if folder]


if __name__ == "__main__":
    main()
