"""Updates and digests of a module of more than a gigabyte, each beside its limit measured in the same run.

``python -m safelight.benchmarks.weights [--quick] [--tp N]`` serves the embedded model with a random transformer of
1.3 GB, and in each round takes every limit and every route once, so that a drift of the machine meets both alike; the
ratio of limit and route is taken round by round, and its median counts. Written to ``benchmarks/results/weights.json``
and ``weights.md``.
"""

from __future__ import annotations

import argparse
import base64
import functools
import hashlib
import itertools
import json
import os
import socket
import statistics
import subprocess
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
import torch
from safetensors.torch import load_file, save_file

from safelight.benchmarks.machine import describe
from safelight.benchmarks.models import save_large
from safelight.benchmarks.serving import SHAPES, free_port, serving
from safelight.client import Client

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SAFETENSORS = {"Content-Type": "application/x-safetensors"}
DRAWING = {"prompt": "a red circle", "seed": 1}
PIECE = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, ten seconds of load: to see that it runs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=120, help="of updates under generation, one a second")
    options = parser.parse_args()
    rounds, seconds = (1, 10) if options.quick else (options.rounds, options.seconds)
    model = save_large(SHAPES, Path(tempfile.gettempdir()) / "safelight-large-1300mb")
    found: dict[str, Any] = {"machine": describe(), "options": vars(options)}
    with served(model, options.tp) as url, Client(url) as client:
        found["routes"] = measure_routes(Routes(client, model), rounds)
        found["pause"] = measure_pause(client, model, rounds)
    with served(SHAPES, options.tp) as url:
        found["small"] = measure_small(url, 20 if options.quick else 300)
        found["steady"] = measure_steady(url, seconds)
    print(table(found))
    if not options.quick:
        name = "weights" if options.tp == 1 else f"weights-tp{options.tp}"
        (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
        (RESULTS / f"{name}.md").write_text(table(found))


@contextmanager
def served(model: Path, tp: int) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "safelight.server", str(model), "--port", str(port), "--tp", str(tp)]
    with serving([*command, "--dtype", "float32", "--log-level", "warning"], port) as url:
        yield url


class Routes:
    """Functions for every route of a module's bytes into the server, and for the limit of each route."""

    def __init__(self, client: Client, model: Path) -> None:
        self._client = client
        self._http = httpx.Client(base_url=client.base_url, timeout=300)  # as a trainer keeps one
        self._file = _weights_of(model)
        self._tensors = load_file(self._file)
        self.nbytes = sum(tensor.nbytes for tensor in self._tensors.values())
        self._parameters = [torch.empty_like(tensor) for tensor in self._tensors.values()]
        self._body = self._file.read_bytes()
        self._shared = (
            Path(httpx.get(f"{client.base_url}/server_info").json()["shared_memory"]) / "benchmark.safetensors"
        )
        self._shared.write_bytes(self._body)
        told = client.weights.checksum(["transformer"], detail=True)
        self._expected = {name: tensor.sha256 for name, tensor in told["transformer"].tensors.items()}
        self._base64 = base64.b64encode(self._body)
        self._trainer = subprocess.Popen(
            [sys.executable, "-m", "safelight.benchmarks.sharing_trainer", str(self._file)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._reader_port = free_port()
        self._reader = subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks/reading_app.py"), str(self._reader_port)]
        )

    def close(self) -> None:
        self._http.close()
        assert self._trainer.stdin is not None
        self._trainer.stdin.close()
        self._trainer.wait()
        self._reader.terminate()
        self._reader.wait()
        self._shared.unlink()

    # --- limits

    def copy(self) -> None:
        """From memory to memory."""
        for parameter, tensor in zip(self._parameters, self._tensors.values(), strict=True):
            parameter.copy_(tensor)

    def copy_of_file(self) -> None:
        """From the file that is in the page cache, as a loop over a safetensors file does it."""
        for parameter, tensor in zip(self._parameters, load_file(self._file).values(), strict=True):
            parameter.copy_(tensor)

    def bare_http(self) -> None:
        send_body(self._reader_port, "/", self._body)

    def base64_alone(self) -> None:
        base64.b64decode(self._base64)

    def hash_one_stream(self) -> None:
        hashlib.sha256(self._body).digest()

    def hash_all_cores(self) -> None:
        cores = os.cpu_count() or 1
        share = -(-len(self._body) // cores)
        parts = [memoryview(self._body)[start : start + share] for start in range(0, len(self._body), share)]
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(lambda part: hashlib.sha256(part).digest(), parts))

    # --- routes

    def disk(self) -> None:
        self._client.weights.update_from_disk(self._file, target_modules=["transformer"])

    def shared_memory(self) -> None:
        self._post("/update_weights_from_tensor", {"shared": {"path": str(self._shared)}})

    def client_update(self) -> None:
        self._client.weights.update(self._tensors, verify=False)

    def client_update_verified(self) -> None:
        self._client.weights.update(self._tensors)

    def http(self) -> None:
        port = httpx.URL(self._client.base_url).port
        assert port is not None
        send_body(port, "/update_weights_from_tensor?target_module=transformer", self._body)

    def json_dialect(self) -> None:
        assert self._trainer.stdin is not None
        assert self._trainer.stdout is not None
        print(file=self._trainer.stdin, flush=True)
        self._post(
            "/update_weights_from_tensor", {"serialized_named_tensors": [self._trainer.stdout.readline().strip()]}
        )

    def checksum(self) -> None:
        self._client.weights.checksum(["transformer"])

    def checksum_of_tensors(self) -> None:
        self._client.weights.checksum(["transformer"], detail=True)

    def checker(self) -> None:
        self._post(
            "/update_weights_from_tensor_checker",
            {"target_module": "transformer", "expected_named_tensors_sha256": self._expected},
        )

    def _post(self, path: str, body: dict[str, Any]) -> None:
        self._http.post(path, json=body).raise_for_status()


PAIRS: list[tuple[str, str, float | None]] = [
    ("shared_memory", "copy", 0.6),
    ("shared_memory", "copy_of_file", None),
    ("disk", "copy", 0.6),
    ("disk", "copy_of_file", None),
    ("http", "bare_http", 0.5),
    ("json_dialect", "base64_alone", 0.5),
    ("json_dialect", "copy", None),
    ("checksum", "hash_one_stream", 0.9),
    ("checker", "hash_all_cores", 0.9),
    ("checksum_of_tensors", "hash_one_stream", None),
    ("client_update", "copy", None),
    ("client_update_verified", "copy", None),
]
"""Each route, a limit, and the ratio that is wanted."""


def measure_routes(routes: Routes, rounds: int) -> dict[str, Any]:
    """GB/s of each route and its limit, and the median of their ratios. The first round is not counted."""
    seconds: dict[str, list[float]] = {}
    names = dict.fromkeys([*(limit for _, limit, _ in PAIRS), *(route for route, _, _ in PAIRS)])
    try:
        for number in range(rounds + 1):
            for name in names:
                took = _timed(getattr(routes, name))
                if number:
                    seconds.setdefault(name, []).append(took)
            line = ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items())
            print(f"round {number}: {line}", flush=True)
    finally:
        routes.close()
    rates = {name: routes.nbytes / statistics.median(times) / 1e9 for name, times in seconds.items()}
    return {
        "bytes": routes.nbytes,
        "gb_per_s": rates,
        "ratios": [
            {
                "route": route,
                "limit": limit,
                "wanted": wanted,
                "ratio": statistics.median(a / b for a, b in zip(seconds[limit], seconds[route], strict=True)),
            }
            for route, limit, wanted in PAIRS
        ],
        "seconds": seconds,
    }


def measure_pause(client: Client, model: Path, rounds: int) -> dict[str, Any]:
    """The longest wait for the next event that a client has in two drawings, with all weights replaced and without."""
    tensors = load_file(_weights_of(model))
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
        name, tensor = min(load_file(_weights_of(SHAPES)).items(), key=lambda pair: pair[1].nbytes)
        file = Path(folder, "small.safetensors")
        save_file({name: tensor}, file)
        body, times = file.read_bytes(), []
        for _ in range(number + 10):
            times.append(
                _timed(
                    lambda: session.post(
                        f"{url}/update_weights_from_tensor", content=body, headers=SAFETENSORS
                    ).raise_for_status()
                )
            )
    times = sorted(times[10:])
    return {"median_ms": statistics.median(times) * 1e3, "p95_ms": times[int(len(times) * 0.95)] * 1e3}


def measure_steady(url: str, seconds: int) -> dict[str, Any]:
    """Four clients that draw all the time, and an update a second, by turns in each mode that ends no request."""
    tensors = load_file(_weights_of(SHAPES))
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
            told = httpx.post(f"{url}/generate", json=DRAWING | {"num_inference_steps": 1}, timeout=60).json()
            stale += told["weight_versions"] != [given[-1]]
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


def send_body(port: int, path: str, body: bytes) -> None:
    """POST ``body`` with as little in the sender's way as possible. Raises ``RuntimeError`` unless it is a 200."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/x-safetensors\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode())
        for start in range(0, len(body), PIECE):
            connection.sendall(memoryview(body)[start : start + PIECE])
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
    if b" 200 " not in reply.split(b"\r\n", 1)[0]:
        raise RuntimeError(reply.decode(errors="replace"))


def _weights_of(model: Path) -> Path:
    return model / "transformer" / "diffusion_pytorch_model.safetensors"


def _timed(do: Callable[[], object]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


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
