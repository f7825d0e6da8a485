"""Updates and digests of a module of more than a gigabyte, each beside its limit measured in the same run.

``python -m safelight.benchmarks.weights [--quick] [--tp N] [--device cuda]`` serves the embedded model with a random
transformer of 1.3 GB, and in each round takes every limit and every route once, so that a drift of the machine meets
both alike; the ratio of limit and route is taken round by round, and its median counts. On a GPU, updates, sleep and
wake are compared with a copy from page-locked memory, too. Written to ``benchmarks/results/weights.json`` and
``weights.md``, on a GPU to ``weights-cuda.json`` and ``weights-cuda.md``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from safetensors.torch import load_file, save_file

from safelight.benchmarks.machine import describe
from safelight.benchmarks.models import save_large
from safelight.benchmarks.serving import SHAPES, free_port, serving
from safelight.benchmarks.weight_routes import Routes, measure_routes, timed, weights_of
from safelight.client import Client

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SAFETENSORS = {"Content-Type": "application/x-safetensors"}
DRAWING = {"prompt": "a red circle", "seed": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, ten seconds of load: to see that it runs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the server")
    parser.add_argument("--seconds", type=int, default=120, help="of updates under generation, one a second")
    options = parser.parse_args()
    rounds, seconds = (1, 10) if options.quick else (options.rounds, options.seconds)
    model = save_large(SHAPES, Path(tempfile.gettempdir()) / "safelight-large-1300mb")
    found: dict[str, Any] = {"machine": describe(), "options": vars(options)}
    with served(model, options.tp, options.device) as url, Client(url) as client:
        found["routes"] = measure_routes(Routes(client, model), rounds)
        found["pause"] = measure_pause(client, model, rounds)
    with served(SHAPES, options.tp, options.device) as url:
        found["small"] = measure_small(url, 20 if options.quick else 300)
        found["steady"] = measure_steady(url, seconds)
    print(table(found))
    if not options.quick:
        on_gpu = any(row["limit"] == "bus" for row in found["routes"]["ratios"])
        name = "weights" + ("-cuda" if on_gpu else "") + ("" if options.tp == 1 else f"-tp{options.tp}")
        (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
        (RESULTS / f"{name}.md").write_text(table(found))


@contextmanager
def served(model: Path, tp: int, device: str) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "safelight.server", str(model), "--port", str(port), "--tp", str(tp)]
    with serving([*command, "--device", device, "--dtype", "float32", "--log-level", "warning"], port) as url:
        yield url


def measure_pause(client: Client, model: Path, rounds: int) -> dict[str, Any]:
    """The longest wait for the next event that a client has in two drawings, with all weights replaced and without."""
    tensors = load_file(weights_of(model))
    found: dict[str, Any] = {}
    for mode in ("in_place", "wait"):
        replaced, left = [], []
        for _ in range(rounds):
            left.append(_longest_wait(client, lambda: None))
            update = functools.partial(client.weights.update, tensors, mode=mode, verify=False)
            replaced.append(_longest_wait(client, update))
        found[mode] = {"replaced_s": statistics.median(replaced), "left_s": statistics.median(left)}
    return found


def _longest_wait(client: Client, update: Callable[[], object]) -> float:
    """In two drawings, one after the other, during which ``update`` is called once."""
    times: list[float] = []
    begun = threading.Event()

    def draw() -> None:
        for _ in range(2):
            for _ in client.stream(**DRAWING, num_inference_steps=8):
                times.append(time.perf_counter())
                begun.set()

    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(draw)
        begun.wait(60)
        update()
        drawing.result()
    return max(b - a for a, b in itertools.pairwise(times))


def measure_small(url: str, number: int) -> dict[str, float]:
    """Milliseconds of an update of one small tensor of the embedded model, from request to reply."""
    with httpx.Client(timeout=60) as session, tempfile.TemporaryDirectory() as folder:
        name, tensor = min(load_file(weights_of(SHAPES)).items(), key=lambda pair: pair[1].nbytes)
        file = Path(folder, "small.safetensors")
        save_file({name: tensor}, file)
        body, times = file.read_bytes(), []
        for _ in range(number + 10):
            times.append(
                timed(
                    lambda: session.post(
                        f"{url}/update_weights_from_tensor", content=body, headers=SAFETENSORS
                    ).raise_for_status()
                )
            )
    times = sorted(times[10:])
    return {"median_ms": statistics.median(times) * 1e3, "p95_ms": times[int(len(times) * 0.95)] * 1e3}


def measure_steady(url: str, seconds: int) -> dict[str, Any]:
    """Four clients that draw all the time, and an update a second, by turns in each mode that ends no request."""
    tensors = load_file(weights_of(SHAPES))
    stop = threading.Event()
    with Client(url) as client, ThreadPoolExecutor(4) as pool:
        given = [client.weights.version()]

        def draw(number: int) -> tuple[list[list[str]], int]:
            versions: list[list[str]] = []
            failed = 0
            while not stop.is_set():
                answer = httpx.post(f"{url}/generate", json=DRAWING | {"num_inference_steps": 4}, timeout=60)
                failed += answer.status_code != 200
                versions.append(answer.json().get("weight_versions", []))
            return versions, failed

        drawings = [pool.submit(draw, number) for number in range(4)]
        stale, started = 0, time.monotonic()
        for number in range(seconds):
            began = time.monotonic()
            given.append(f"step-{number}")
            changed = {name: tensor * (1 + 0.001 * number) for name, tensor in tensors.items()}
            client.weights.update(changed, version=given[-1], mode=("wait", "in_place")[number % 2])
            reply = httpx.post(f"{url}/generate", json=DRAWING | {"num_inference_steps": 1}, timeout=60).json()
            stale += reply["weight_versions"] != [given[-1]]
            time.sleep(max(0.0, 1 - (time.monotonic() - began)))
        took = time.monotonic() - started
        stop.set()
        results = [drawing.result() for drawing in drawings]
    seen = [version for drawn, _ in results for versions in drawn for version in versions]
    return {
        "updates": len(given) - 1,
        "seconds": took,
        "pictures": sum(len(drawn) for drawn, _ in results),
        "failed_requests": sum(failed for _, failed in results),
        "versions_that_did_not_exist": len(set(seen) - set(given)),
        "older_than_the_reply_before": stale,
        "versions_seen": len(set(seen)),
    }


def table(found: dict[str, Any]) -> str:
    routes = found["routes"]
    lines = [
        f"Machine: {json.dumps(found['machine'])}",
        "",
        f"A transformer of {routes['bytes'] / 1e9:.2f} GB in float32, {found['options']['tp']} rank(s). Ratios are",
        "medians of the rounds' ratios.",
        "",
        "| route | GB/s | limit | GB/s | ratio | wanted |",
        "|---|---|---|---|---|---|",
    ]
    for row in routes["ratios"]:
        wanted = "" if row["wanted"] is None else f"{row['wanted']:g}"
        rate, limit = routes["gb_per_s"][row["route"]], routes["gb_per_s"][row["limit"]]
        lines.append(f"| {row['route']} | {rate:.2f} | {row['limit']} | {limit:.2f} | {row['ratio']:.2f} | {wanted} |")
    lines.append("")
    lines += [
        "The dialect's payload has handles, and no tensor of it is decoded from base64: its limit is what it replaces.",
        "",
    ]
    for mode, row in found["pause"].items():
        lines.append(
            f"A client that draws waits at most {row['replaced_s']:.2f} s for an event while all weights are replaced "
            f"({mode}), and {row['left_s']:.2f} s when they are left alone."
        )
    small, steady = found["small"], found["steady"]
    lines += [
        "",
        f"One small bucket: {small['median_ms']:.1f} ms median, {small['p95_ms']:.1f} ms p95.",
        "",
        f"{steady['updates']} updates in {steady['seconds']:.0f} s while four clients drew {steady['pictures']} "
        f"pictures: {steady['failed_requests']} requests failed, {steady['versions_that_did_not_exist']} results were "
        f"of versions that did not exist, {steady['older_than_the_reply_before']} older than the reply before them.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
