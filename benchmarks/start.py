"""How long a server takes to be ready, and a killed worker to draw again.

A later start takes over the self-test's result of the first one; a first start and one without the nursery do not.
``python -m safelight.benchmarks.start`` starts servers of the embedded model in turn, ``--rounds`` of each, and kills
the worker of each. ``--before PYTHON`` names the interpreter of an environment with an older version of Safelight,
which takes its turns too. Medians count. Written to ``benchmarks/results/start.json`` and ``start.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import psutil

from safelight.benchmarks.machine import describe

RESULTS = Path(__file__).resolve().parent / "results"
LIMIT_S = 300.0
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
    """Seconds from the command to ``/health`` 200, and from the worker's death to the next picture."""

    ready: float
    restart: float


def measure(variant: Variant, caches: str) -> Times:
    command = [variant.python, "-P", "-m", "safelight.server", "shapes", "--port", "0", *variant.flags]
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
            _until(lambda: _answers(url, "GET"))
            ready = time.perf_counter() - started
            assert _answers(url, "POST")
            psutil.Process(worker).kill()
            killed = time.perf_counter()
            _until(lambda: not _answers(url, "GET"))
            _until(lambda: _answers(url, "POST"))
            return Times(ready, time.perf_counter() - killed)
        finally:
            server.send_signal(signal.SIGTERM)
            server.communicate()


class _Log:
    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def find(self, pattern: re.Pattern[str]) -> str:
        for line in self._stream:
            if (match := pattern.search(line)) is not None:
                return match[1]
        raise RuntimeError("the server ended")


def _answers(url: str, method: str) -> bool:
    """True if the server is healthy (GET), or generates a picture (POST)."""
    body = {"prompt": "a red circle", "num_inference_steps": 1}
    try:
        if method == "GET":
            return httpx.get(f"{url}/health").status_code == 200
        return httpx.post(f"{url}/generate", json=body, timeout=60).status_code == 200
    except httpx.TransportError:
        return False


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
    found: dict[str, list[Times]] = {variant.name: [] for variant in variants}
    with tempfile.TemporaryDirectory() as caches:
        measure(variants[0], caches)  # whose result the later starts take over
        for round_number in range(given.rounds):
            for variant in variants:
                found[variant.name].append(measure(variant, caches))
                print(round_number, variant.name, found[variant.name][-1], flush=True)
    write(found, given.rounds)


def write(found: dict[str, list[Times]], rounds: int) -> None:
    machine = describe()
    medians = {
        name: Times(statistics.median(t.ready for t in times), statistics.median(t.restart for t in times))
        for name, times in found.items()
    }
    every = {name: [[t.ready, t.restart] for t in times] for name, times in found.items()}
    (RESULTS / "start.json").write_text(json.dumps({"machine": machine, "seconds": every}, indent=1) + "\n")
    first = medians["first start"]
    lines = [
        "# Start and restart of a server",
        "",
        f"Medians of {rounds} rounds, the variants in turn, on {machine['cores']} cores of {machine['processor']}.",
        "Made by `python -m safelight.benchmarks.start`.",
        "",
        "| | ready, s | ratio | a killed worker draws again, s | ratio |",
        "|---|---|---|---|---|",
        *(_row(name, times, first) for name, times in medians.items()),
    ]
    (RESULTS / "start.md").write_text("\n".join(lines) + "\n")


def _row(name: str, times: Times, first: Times) -> str:
    ready = f"{times.ready:.2f} | {times.ready / first.ready:.2f}"
    return f"| {name} | {ready} | {times.restart:.2f} | {times.restart / first.restart:.2f} |"


if __name__ == "__main__":
    main()
