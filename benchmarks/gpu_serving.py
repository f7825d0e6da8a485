"""A server on one GPU: its start, its first picture, one client and several, and updates of its weights."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file

from safelight.benchmarks.gpu_diffusers import PROMPT, timed
from safelight.benchmarks.serving import free_port
from safelight.client import Client

PICTURES = 3
CLIENTS = 8
START_S = 300


class StartFailed(Exception):
    """The server ended, or was not healthy in time."""


@dataclass(frozen=True)
class Served:
    """Servers of the checkpoint in ``model`` on ``device``; ``output`` has the fields of a request."""

    model: Path
    device: str
    output: Mapping[str, Any]

    def measured(self, options: Sequence[str], *, batching: bool, updates: bool) -> dict[str, Any]:
        """Measure a server with ``options``. Raises ``StartFailed`` with the end of the server's log."""
        began = time.perf_counter()
        with self._server(options) as url:
            found: dict[str, Any] = {"start_s": time.perf_counter() - began}
            self._draw(url)
            found["first_output_s"] = time.perf_counter() - began
            with busy(self.device) as shares:
                found["output_s"] = statistics.median(timed(lambda: self._draw(url)) for _ in range(PICTURES))
            found["gpu_busy_percent"] = statistics.mean(shares) if shares else None
            if batching:
                found |= self._batching(url)
            if updates:
                found |= self._updates(url)
            found["counters"] = graph_counters(url)
        return found

    def _batching(self, url: str) -> dict[str, Any]:
        """Pictures per second at a quarter of the pixels: one client, and several at once."""
        smaller = {"width": self.output["width"] // 2, "height": self.output["height"] // 2}
        rates = {}
        for clients in (1, CLIENTS):
            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(lambda seed: self._draw(url, seed, **smaller), range(clients)))
                pictures = range(PICTURES * clients)
                seconds = timed(lambda: list(pool.map(lambda seed: self._draw(url, seed, **smaller), pictures)))  # noqa: B023
            rates[clients] = len(pictures) / seconds
        return {
            "small_pictures_per_s": rates[1],
            f"small_pictures_per_s_{CLIENTS}_clients": rates[CLIENTS],
            "batching_ratio": rates[CLIENTS] / rates[1],
        }

    def _updates(self, url: str) -> dict[str, Any]:
        """An update of the whole denoiser from tensors of this process (through CUDA handles on a GPU), and digests."""
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted((self.model / "transformer").glob("*.safetensors")):
            tensors |= load_file(file, device=self.device)
        gigabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
        route = "ipc" if self.device == "cuda" else "shared"
        with Client(url) as client:
            seconds = [timed(lambda: client.weights.update(tensors, verify=False, route=route)) for _ in range(2)]
            digests = timed(lambda: client.weights.checksum(["transformer"]))
        return {
            "update_gb": gigabytes,
            "first_update_s": seconds[0],
            "update_s": seconds[1],
            "update_gb_per_s": gigabytes / seconds[1],
            "checksum_s": digests,
        }

    def _draw(self, url: str, seed: int = 0, **fields: Any) -> None:
        body = {"prompt": PROMPT, "seed": seed, **self.output, **fields}
        answer = httpx.post(f"{url}/generate", json=body, timeout=START_S)
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {answer.text[:300]}")

    @contextmanager
    def _server(self, options: Sequence[str]) -> Iterator[str]:
        port = free_port()
        command = [sys.executable, "-m", "safelight.server", str(self.model), "--port", str(port)]
        command += ["--device", self.device, "--max-outputs", "16", *options]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            try:
                _wait_until_healthy(f"http://127.0.0.1:{port}", process)
                yield f"http://127.0.0.1:{port}"
            except StartFailed as failed:
                log.seek(0)
                raise StartFailed(f"{failed}: {log.read()[-500:]}") from None
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(60)


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + START_S
    while time.monotonic() < ends:
        if process.poll() is not None:
            raise StartFailed(f"the server ended with status {process.returncode}")
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(0.1)
    raise StartFailed(f"the server was not healthy within {START_S} s")


@contextmanager
def busy(device: str) -> Iterator[list[float]]:
    """The list is filled, when the context ends, with percentages of time in which a kernel ran (``nvidia-smi``)."""
    shares: list[float] = []
    if device != "cuda":
        yield shares
        return
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as sampler:
        try:
            yield shares
        finally:
            sampler.terminate()
            printed, _ = sampler.communicate()
            shares += [float(line) for line in printed.split() if line.isdigit()]


def graph_counters(url: str) -> dict[str, float]:
    """The server's metrics about graphs and compilation, by name."""
    lines = httpx.get(f"{url}/metrics", timeout=10).text.splitlines()
    named = [
        line.rsplit(" ", 1) for line in lines if not line.startswith("#") and ("graph" in line or "compil" in line)
    ]
    return {name: json.loads(value) for name, value in named}
