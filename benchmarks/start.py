"""How long a server takes to be ready, and a killed worker to draw again.

A later start takes over the self-test's result of the first one; a first start and one without the nursery do not.
``python -m safelight.benchmarks.start`` runs ``safelight serve shapes`` in turn, ``--rounds`` times each way, and kills
the worker of each. ``--before PYTHON`` names the interpreter of an environment with an older version of Safelight,
which takes its turns too. Each round also times a process that only imports torch, transformers and diffusers: no start
is faster, and how many times as long one takes depends less on the machine than its seconds do. Medians count. Written
to ``benchmarks/results/start.json`` and ``start.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import IO

import httpx
import psutil

from safelight.benchmarks.machine import describe

RESULTS = Path(__file__).resolve().parent / "results"
LIMIT_S = 300.0
IMPORTS = """
import sys
sys.modules["peft"] = None  # which no server imports
import safelight, torch, transformers  # first the one that lets torchvision be imported without its operators
from diffusers import DiffusionPipeline
"""
_URL = re.compile(r"listening on (http://\S+)")
_WORKER = re.compile(r"started worker 0 with process id (\d+)")


@dataclass(frozen=True)
class Variant:
    """A way to start a server: the interpreter and the flags."""

    name: str
    python: str
    flags: Sequence[str]


@dataclass(frozen=True)
class Times:
    """Seconds from the command to ``/health`` 200, and from the worker's death to the next picture.

    ``cpu`` are those of all processes until ``/health`` was 200.
    """

    ready: float
    cpu: float
    restart: float = 0.0


def imports() -> Times:
    """The times of a process that imports the libraries, and never draws."""
    started, before = time.perf_counter(), _cpu_of_children()
    subprocess.run([sys.executable, "-P", "-c", IMPORTS], check=True, stderr=subprocess.DEVNULL)
    return Times(time.perf_counter() - started, _cpu_of_children() - before)


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(variant: Variant, caches: str) -> Times:
    command = [str(Path(variant.python).with_name("safelight")), "serve", "shapes", "--port", "0", *variant.flags]
    environment = {**os.environ, "XDG_CACHE_HOME": caches}
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        try:
            assert server.stderr is not None
            log = _Log(server.stderr)
            url = log.find(_URL)
            worker = int(log.find(_WORKER))
            threading.Thread(target=server.stderr.read, daemon=True).start()  # a server whose pipe is full waits
            with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:  # one: each reads certificates
                _until(lambda: _answers(client, "GET"))
                ready, cpu = time.perf_counter() - started, _cpu_of(psutil.Process(server.pid))
                assert _answers(client, "POST")
                psutil.Process(worker).kill()
                killed = time.perf_counter()
                _until(lambda: not _answers(client, "GET"))
                _until(lambda: _answers(client, "POST"))
                return Times(ready, cpu, time.perf_counter() - killed)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()


def _cpu_of(server: psutil.Process) -> float:
    """Seconds that the processes of ``server`` have computed."""
    times = [process.cpu_times() for process in (server, *server.children(recursive=True))]
    return sum(time.user + time.system for time in times)


class _Log:
    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def find(self, pattern: re.Pattern[str]) -> str:
        for line in self._stream:
            if (match := pattern.search(line)) is not None:
                return match[1]
        raise RuntimeError("the server ended")


def _answers(client: httpx.Client, method: str) -> bool:
    """True if the server is healthy (GET), or generates a picture (POST)."""
    body = {"prompt": "a red circle", "num_inference_steps": 1}
    try:
        answer = client.get("/health") if method == "GET" else client.post("/generate", json=body)
    except httpx.TransportError:
        return False
    return answer.status_code == 200


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError("the server did not succeed in time")
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", metavar="PYTHON", help="of an environment with an older version")
    given = parser.parse_args()
    anew = ("--no-self-test-cache",)
    variants = [
        Variant("later start", sys.executable, ()),
        Variant("first start", sys.executable, anew),
        Variant("first start, no nursery", sys.executable, ("--no-nursery", *anew)),
    ]
    if given.before is not None:
        variants.append(Variant("before", given.before, ()))
    found: dict[str, list[Times]] = {"imports alone": [], **{variant.name: [] for variant in variants}}
    with tempfile.TemporaryDirectory() as caches:
        measure(variants[0], caches)  # whose result the later starts take over
        for round_number in range(given.rounds):
            found["imports alone"].append(imports())
            for variant in variants:
                found[variant.name].append(measure(variant, caches))
                print(round_number, variant.name, found[variant.name][-1], flush=True)
    write(found, given.rounds)


def write(found: dict[str, list[Times]], rounds: int) -> None:
    machine = describe()
    medians = {name: _median(times) for name, times in found.items()}
    every = {name: [asdict(one) for one in times] for name, times in found.items()}
    (RESULTS / "start.json").write_text(json.dumps({"machine": machine, "seconds": every}, indent=1) + "\n")
    lines = [
        "# Start and restart of a server",
        "",
        f"Medians of {rounds} rounds, the variants in turn, on {machine['cores']} cores of {machine['processor']}.",
        "Made by `python -m safelight.benchmarks.start`. Ratios are to a process that imports the libraries alone.",
        "",
        "| | ready, s | ratio | CPU, s | ratio | a killed worker draws again, s | ratio |",
        "|---|---|---|---|---|---|---|",
        *(_row(name, times, medians["imports alone"]) for name, times in medians.items()),
    ]
    (RESULTS / "start.md").write_text("\n".join(lines) + "\n")


def _median(times: Sequence[Times]) -> Times:
    return Times(*(statistics.median(column) for column in zip(*map(astuple, times), strict=True)))


def _row(name: str, times: Times, alone: Times) -> str:
    ratios = ((times.ready, alone.ready), (times.cpu, alone.cpu), (times.restart, alone.ready))
    cells = (f"{value:.2f} | {value / unit:.2f}" if value else "– | –" for value, unit in ratios)
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
