"""A server on one GPU: its start, its first picture, one client and several, and updates of its weights."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file

from safelight.benchmarks.gpu_diffusers import PROMPT, timed
from safelight.benchmarks.gpu_run import Figures, TooLong
from safelight.benchmarks.serving import free_port
from safelight.client import Client
from safelight.client.transports import TransportName

PICTURES = 3
CLIENTS = 8
START_S = 300
REQUEST_S = 120
END_S = 20
SAMPLE_S = 0.2
LOG_CHARACTERS = 2000


class StartFailed(Exception):
    """The server ended, or was not healthy in time."""


@dataclass(frozen=True)
class Served:
    """Servers of the checkpoint in ``model`` on ``device``; ``output`` has the fields of a request."""

    model: Path
    device: str
    output: Mapping[str, Any]

    def measured(self, options: Sequence[str], *, batching: bool, updates: bool, counts: str | None) -> Figures:
        """Measure a server with ``options``. Exceptions have the end of the server's log as a note.

        A metric with ``counts`` in its name must be above 0 in the end: otherwise the options had no effect.
        """
        began = time.perf_counter()
        with self._server(options) as url:
            yield {"start_s": time.perf_counter() - began}
            self._draw(url)
            yield {"first_output_s": time.perf_counter() - began}
            with busy(self.device) as shares:
                yield {"output_s": statistics.median(timed(lambda: self._draw(url)) for _ in range(PICTURES))}
            yield {"gpu_busy_percent": statistics.mean(shares) if shares else None, "counters": graph_counters(url)}
            if batching:
                yield from self._batching(url)
            if updates:
                yield from self._updates(url)
            counters = graph_counters(url)
            yield {"counters": counters}
            if counts is not None and not any(value for name, value in counters.items() if counts in name):
                raise RuntimeError(f"the options had no effect: {counts} is 0")

    def _batching(self, url: str) -> Figures:
        """Pictures per second at a quarter of the pixels: one client, and several at once."""
        rates = {}
        for clients, name in ((1, "small_pictures_per_s"), (CLIENTS, f"small_pictures_per_s_{CLIENTS}_clients")):
            self._draw_small(url, clients, clients)
            pictures = PICTURES * clients
            rates[clients] = pictures / timed(lambda: self._draw_small(url, clients, pictures))  # noqa: B023
            yield {name: rates[clients]}
        yield {"batching_ratio": rates[CLIENTS] / rates[1]}

    def _draw_small(self, url: str, clients: int, pictures: int) -> None:
        smaller = {"width": self.output["width"] // 2, "height": self.output["height"] // 2}
        pool = ThreadPoolExecutor(clients)
        try:
            list(pool.map(lambda seed: self._draw(url, seed, **smaller), range(pictures)))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # what is under way ends with the server

    def _updates(self, url: str) -> Figures:
        """Updates of the whole denoiser from tensors of this process (through CUDA handles on a GPU), and digests."""
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted((self.model / "transformer").glob("*.safetensors")):
            tensors |= load_file(file, device=self.device)
        gigabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
        yield {"update_gb": gigabytes}
        with Client(url) as client:
            yield from updates(
                lambda route: client.weights.update(tensors, verify=False, route=route),
                "ipc" if self.device == "cuda" else "shared",
                gigabytes,
            )
            yield {"checksum_s": timed(lambda: client.weights.checksum(["transformer"]))}

    def _draw(self, url: str, seed: int = 0, **fields: Any) -> None:
        body = {"prompt": PROMPT, "seed": seed, **self.output, **fields}
        answer = httpx.post(f"{url}/generate", json=body, timeout=REQUEST_S)
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
            except (Exception, TooLong) as error:
                log.seek(0)
                error.add_note(f"The server's log ends with:\n{log.read()[-LOG_CHARACTERS:]}")
                raise
            finally:
                _end(process)


def updates(update: Callable[[TransportName], Any], route: TransportName, gigabytes: float) -> Figures:
    """A first update and another one by ``route``, or through host memory if the system does not let it be."""
    for name in ("first_update", "update"):
        try:
            seconds = timed(lambda: update(route))  # noqa: B023  # called here
        except Exception as error:
            if route == "shared":
                raise
            yield {f"{route}_error": f"{type(error).__name__}: {error}"}
            route = "shared"
            seconds = timed(lambda: update(route))  # noqa: B023  # called here
        yield {"route": route, f"{name}_s": seconds, f"{name}_gb_per_s": gigabytes / seconds}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server, whose processes end with it. Running requests get no time, as nobody waits for them any more."""
    process.terminate()
    time.sleep(0.1)
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


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
    """The list fills with percentages of time in which a kernel ran (``nvidia-smi``); empty if nobody can tell."""
    shares: list[float] = []
    if device != "cuda" or shutil.which("nvidia-smi") is None:
        yield shares
        return
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_S):
            asked = subprocess.run(_UTILIZATION, capture_output=True, text=True, timeout=END_S, check=False)
            shares.extend(float(line) for line in asked.stdout.split() if line.isdigit())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield shares
    finally:
        done.set()
        sampler.join()


_UTILIZATION = ("nvidia-smi", "--id=0", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits")


def graph_counters(url: str) -> dict[str, float]:
    """The server's metrics about graphs and compilation, by name."""
    lines = httpx.get(f"{url}/metrics", timeout=10).text.splitlines()
    named = [
        line.rsplit(" ", 1) for line in lines if not line.startswith("#") and ("graph" in line or "compil" in line)
    ]
    return {name: json.loads(value) for name, value in named}
