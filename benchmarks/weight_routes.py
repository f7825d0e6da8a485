"""The routes of a module's bytes into a server, each beside its limit, by turns."""

from __future__ import annotations

import base64
import hashlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file

from safelight.benchmarks.serving import free_port
from safelight.client import Client

ROOT = Path(__file__).resolve().parent.parent
PIECE = 1 << 20


class Routes:
    """Functions for every route of a module's bytes into the server, and for the limit of each route."""

    def __init__(self, client: Client, model: Path) -> None:
        self._client = client
        self._http = httpx.Client(base_url=client.base_url, timeout=300)  # as a trainer keeps one
        self._file = weights_of(model)
        self._tensors = load_file(self._file)
        self.nbytes = sum(tensor.nbytes for tensor in self._tensors.values())
        self._parameters = [torch.empty_like(tensor) for tensor in self._tensors.values()]
        self._body = self._file.read_bytes()
        info = httpx.get(f"{client.base_url}/server_info").json()
        self._shared = Path(info["shared_memory"]) / "benchmark.safetensors"
        self.on_gpu = info["models"][0]["device"].startswith("cuda")
        self._shared.write_bytes(self._body)
        checksums = client.weights.checksum(["transformer"], detail=True)
        self._expected = {name: tensor.sha256 for name, tensor in checksums["transformer"].tensors.items()}
        self._base64 = base64.b64encode(self._body)
        self._trainer = subprocess.Popen(
            [sys.executable, "-m", "safelight.benchmarks.sharing_trainer", str(self._file)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        if self.on_gpu:
            self._pinned = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=True)
            self._on_device = torch.empty(self.nbytes, dtype=torch.uint8, device="cuda")
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

    def bus(self) -> None:
        """From page-locked memory to the GPU."""
        self._on_device.copy_(self._pinned, non_blocking=True)
        torch.cuda.synchronize()

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

    def sleep(self) -> None:
        self._post("/release_memory_occupation", {"tags": ["transformer"]})

    def wake(self) -> None:
        self._post("/resume_memory_occupation", {"tags": ["transformer"]})

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

PAIRS_ON_GPU: list[tuple[str, str, float | None]] = [
    ("shared_memory", "bus", 0.6),
    ("disk", "bus", 0.6),
    ("sleep", "bus", 0.6),
    ("wake", "bus", 0.6),
]
"""Further pairs for a server on a GPU; a sleep is measured before its wake."""


def measure_routes(routes: Routes, rounds: int) -> dict[str, Any]:
    """GB/s of each route and its limit, and the median of their ratios. The first round is not counted."""
    seconds: dict[str, list[float]] = {}
    pairs = [*PAIRS, *(PAIRS_ON_GPU if routes.on_gpu else [])]
    names = dict.fromkeys([*(limit for _, limit, _ in pairs), *(route for route, _, _ in pairs)])
    try:
        for number in range(rounds + 1):
            for name in names:
                took = timed(getattr(routes, name))
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
            for route, limit, wanted in pairs
        ],
        "seconds": seconds,
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


def weights_of(model: Path) -> Path:
    return model / "transformer" / "diffusion_pytorch_model.safetensors"


def timed(do: Callable[[], object]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began
