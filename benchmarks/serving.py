"""Safelight beside plain ``pipeline(...)`` calls and beside a FastAPI app that guards one pipeline with a lock.

``python -m safelight.benchmarks.serving [--quick]`` measures all three in one run, in turns, on the embedded model and
on a random one of about a second a picture, and writes ``benchmarks/results/serving.json`` and ``serving.md``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from diffusers import DiffusionPipeline

from safelight.benchmarks.machine import describe
from safelight.benchmarks.models import save_mid_size

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ROOT / "assets" / "shapes"
SIDE, TEXT_LENGTH = 128, 32
PROMPTS = [
    f"a {size} {colour} {shape} on a {ground} background"
    for size, colour, shape, ground in zip(
        ("small", "medium", "large") * 4,
        ("red", "blue", "green", "yellow") * 3,
        ("circle", "square", "star", "cross", "triangle") * 3,
        ("white", "black") * 6,
        strict=False,
    )
]


@dataclass(frozen=True)
class Load:
    """One measurement of a server: ``clients`` ask one after another, ``pictures`` in all."""

    pictures_per_s: float
    median_latency_s: float


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(command: list[str], port: int) -> Iterator[str]:
    """Run a server, give its URL when it is healthy, and stop it."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"{command} ended with {process.returncode}")
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def safelight(model: Path, dtype: str, threads: int) -> tuple[list[str], int]:
    port = free_port()
    options = ["--port", str(port), "--dtype", dtype, "--threads", str(threads), "--log-level", "warning"]
    return [sys.executable, "-m", "safelight.server", str(model), *options], port


def locked(model: Path, dtype: str, threads: int, app: str) -> tuple[list[str], int]:
    port = free_port()
    values = [dtype, str(port), str(SIDE), str(TEXT_LENGTH), str(threads), app]
    return [sys.executable, "-m", "safelight.benchmarks.locked_app", str(model), *values], port


async def measure(url: str, clients: int, pictures: int, steps: int) -> Load:
    """Closed loop: each client sends its next request when its last was answered."""
    numbers = iter(range(pictures))
    latencies: list[float] = []

    async def client(session: httpx.AsyncClient) -> None:
        for number in numbers:
            body = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, "num_inference_steps": steps}
            began = time.perf_counter()
            answer = await session.post(f"{url}/generate", json=body, headers={"Accept": "image/png"})
            answer.raise_for_status()
            latencies.append(time.perf_counter() - began)

    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=clients)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        seconds = time.perf_counter() - began
    return Load(pictures / seconds, statistics.median(latencies))


def measure_plain(model: Path, dtype: str, pictures: int, steps: int, threads: int) -> float:
    """Median seconds of a plain call, in a process of its own (this file, called with ``--plain``)."""
    command = [sys.executable, "-m", "safelight.benchmarks.serving", "--plain", str(model), "--dtype", dtype]
    command += ["--pictures", str(pictures), "--steps", str(steps), "--threads", str(threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def plain(model: Path, dtype: str, pictures: int, steps: int, threads: int) -> float:
    torch.set_num_threads(threads)
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    seconds = []
    for number in range(pictures + 2):
        generator = torch.Generator("cpu").manual_seed(number)
        began = time.perf_counter()
        arguments = {"width": SIDE, "height": SIDE, "max_sequence_length": TEXT_LENGTH}
        pipeline(PROMPTS[number % len(PROMPTS)], generator=generator, num_inference_steps=steps, **arguments)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def compare(
    model: Path,
    dtype: str,
    *,
    clients: tuple[int, ...],
    pictures: int,
    steps: int,
    rounds: int,
    threads: int,
    app: str = "lock",
) -> Any:
    """Both servers up at once, measured in turns, so that a drift of the machine meets both alike."""
    rows = []
    ours, theirs = safelight(model, dtype, threads), locked(model, dtype, threads, app)
    with serving(*ours) as our_url, serving(*theirs) as their_url:
        for count in clients:
            for url in (our_url, their_url):
                asyncio.run(measure(url, count, count * 2, steps))
            pairs = []
            for _ in range(rounds):
                total = max(pictures, count * 3) if count > 1 else pictures
                theirs_now = asyncio.run(measure(their_url, count, total, steps))
                pairs.append((asyncio.run(measure(our_url, count, total, steps)), theirs_now))
            rows.append(_row(count, pairs))
            print(rows[-1], flush=True)
    return rows


def _row(clients: int, pairs: list[tuple[Load, Load]]) -> dict[str, float]:
    middle = statistics.median
    return {
        "clients": clients,
        "safelight_pictures_per_s": middle(ours.pictures_per_s for ours, _ in pairs),
        "locked_pictures_per_s": middle(theirs.pictures_per_s for _, theirs in pairs),
        "ratio": middle(ours.pictures_per_s / theirs.pictures_per_s for ours, theirs in pairs),
        "safelight_median_s": middle(ours.median_latency_s for ours, _ in pairs),
        "locked_median_s": middle(theirs.median_latency_s for _, theirs in pairs),
    }


def measure_single(
    model: Path, dtype: str, *, pictures: int, steps: int, rounds: int, threads: int
) -> dict[str, float]:
    """One client beside the plain call: medians of both, and of their ratio round by round."""
    ours, plains = [], []
    with serving(*safelight(model, dtype, threads)) as url:
        asyncio.run(measure(url, 1, 2, steps))
        for _ in range(rounds):
            plains.append(measure_plain(model, dtype, pictures, steps, threads))
            ours.append(asyncio.run(measure(url, 1, pictures, steps)).median_latency_s)
    ratios = [a / b for a, b in zip(ours, plains, strict=True)]
    middle = statistics.median
    return {"safelight_s": middle(ours), "plain_s": middle(plains), "ratio": middle(ratios)}


def measure_path(model: Path, dtype: str, *, requests: int, threads: int) -> dict[str, float]:
    """HTTP → scheduler → worker → HTTP: the client's time less what the worker spent on the picture."""
    with serving(*safelight(model, dtype, threads)) as url, httpx.Client(timeout=60) as session:
        outside = []
        for number in range(requests + 20):
            body = {"prompt": "a red circle", "seed": number, "num_inference_steps": 1}
            began = time.perf_counter()
            timings = session.post(f"{url}/generate", json=body).raise_for_status().json()["timings"]
            outside.append(time.perf_counter() - began - (timings["total_s"] - timings["queue_s"]))
    outside = sorted(outside[20:])
    return {"median_ms": statistics.median(outside) * 1e3, "p95_ms": outside[int(len(outside) * 0.95)] * 1e3}


def table(found: dict[str, Any]) -> str:
    lines = [f"Machine: {json.dumps(found['machine'])}", ""]
    lines += ["Ratios are medians of the rounds' ratios. Safelight's processes have the environment that its launcher"]
    lines += [
        'gives them; the other app has the system\'s. "One thread": it runs its pipeline in a thread of its own.',
        "",
    ]
    head = "| model | clients | Safelight pictures/s | locked app pictures/s | ratio | Safelight median s | locked s |"
    lines += [head, "|---|---|---|---|---|---|---|"]
    for name, rows in found["servers"].items():
        for row in rows:
            lines.append(
                f"| {name} | {row['clients']} | {row['safelight_pictures_per_s']:.2f} "
                f"| {row['locked_pictures_per_s']:.2f} | {row['ratio']:.2f} "
                f"| {row['safelight_median_s']:.3f} | {row['locked_median_s']:.3f} |"
            )
    lines += ["", "| one client beside the plain call | Safelight s | plain s | ratio |", "|---|---|---|---|"]
    for name, row in found["single"].items():
        lines.append(f"| {name} | {row['safelight_s']:.3f} | {row['plain_s']:.3f} | {row['ratio']:.3f} |")
    path = found["path"]
    lines += ["", f"HTTP → scheduler → worker → HTTP: {path['median_ms']:.2f} ms median, {path['p95_ms']:.2f} ms p95"]
    return "\n".join(lines) + "\n"


def measuring_options(description: str | None) -> argparse.Namespace:
    """The options of a benchmark that measures in rounds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round: to see that it runs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few pictures: to see that it runs, not to quote")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        print(plain(options.plain, options.dtype, options.pictures, options.steps, options.threads))
        return
    rounds = 1 if options.quick else options.rounds
    common = {"steps": options.steps, "rounds": rounds, "threads": options.threads}
    mid_size = save_mid_size(SHAPES, Path(tempfile.gettempdir()) / "safelight-mid-size-42m")
    embedded, embedded_wide, random = (SHAPES, "bfloat16"), (SHAPES, "float32"), (mid_size, "float32")
    found: dict[str, Any] = {"machine": describe(), "options": vars(options) | {"plain": None}}
    found["path"] = measure_path(*embedded, requests=20 if options.quick else 200, threads=options.threads)
    print(found["path"], flush=True)
    found["single"] = {}
    for name, model, pictures in (("embedded, bf16", embedded, 12), ("mid-size, fp32", random, 6)):
        found["single"][name] = measure_single(*model, pictures=2 if options.quick else pictures, **common)
        print(name, found["single"][name], flush=True)
    found["servers"] = {
        "embedded, bf16": compare(
            *embedded, clients=(16,) if options.quick else (1, 4, 16), pictures=options.pictures, **common
        ),
        "embedded, bf16, one thread": compare(
            *embedded, clients=(16,), pictures=options.pictures, app="one-thread", **common
        ),
        "embedded, fp32, one thread": compare(
            *embedded_wide, clients=(16,), pictures=options.pictures, app="one-thread", **common
        ),
        "embedded, fp32": compare(*embedded_wide, clients=(16,), pictures=options.pictures, **common),
        "mid-size, fp32": compare(*random, clients=(16,), pictures=16, **(common | {"rounds": min(rounds, 2)})),
    }
    print(table(found))
    if not options.quick:
        save(found)


def save(found: dict[str, Any]) -> None:
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / "serving.json").write_text(json.dumps(found, indent=2) + "\n")
    (results / "serving.md").write_text(table(found))


if __name__ == "__main__":
    main()
