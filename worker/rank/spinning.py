"""How long OpenMP's threads spin: milliseconds while cores are idle, next to nothing while others need them.

A thread that waits for the next operator either spins, which keeps a core from others that need it, or sleeps, which
costs a wake-up at each operator; docs/decisions/0006 has the measurements. libgomp spins for 300,000 rounds, but only
for 100 while the process has more OpenMP threads than there are cores (its manual, ``GOMP_SPINCOUNT``). So a second
team of threads, which all sleep, keeps the model's threads from spinning.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import threading
from pathlib import Path

import torch

log = logging.getLogger(__name__)

CHOSEN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""An environment with one of these has chosen how long threads spin."""

INTERVAL_S = 1.0

CROWDED = 0.25
"""Others need the cores if the main thread waits for one for more than this part of its time. Beside a busy process it
waits for 0.2 to 0.7, beside the server that carries its own outputs away for up to 0.12."""

CALM = 0.15
"""They no longer do if it waits for less than this part."""

LEAST_NS = 100_000_000
"""A thread that was ready for less of an interval, as that of a server without requests, decides nothing."""

CALM_S, MAX_CALM_S = 5.0, 600.0
"""Seconds of idle cores after which the threads spin again; twice as many if they last did so too early."""


def adapt_spinning(threads: int) -> None:
    """Adapt the spinning of the calling thread's ``threads`` to the load of the machine, for as long as it lives."""
    if threads == 1 or any(name in os.environ for name in CHOSEN):
        return
    try:
        spinning = Spinning()
    except OSError as error:
        log.warning(
            "CPU threads spin while they wait for work, also when others need the cores: %s; "
            "to let them sleep, set GOMP_SPINCOUNT=2000",
            error,
        )
        return
    spinning.start()


class Spinning:
    """Watches how long a thread waits for a core, and lets OpenMP's threads spin or sleep accordingly."""

    def __init__(self) -> None:
        """Watch the calling thread. Raises ``OSError`` if the system is not Linux or OpenMP's library not libgomp."""
        self.sleeping: threading.Event | None = None
        """Set it to end the team that keeps the others from spinning; ``None`` if there is none."""
        self._statistics = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        self._ran_and_waited = self._read()
        self._openmp = _openmp()
        self._calm_s, self._needed_s = 0.0, CALM_S
        self._spun_s = math.inf

    def start(self) -> None:
        """Decide every :data:`INTERVAL_S`, in a thread of its own."""
        threading.Thread(target=self._watch, daemon=True, name="spinning").start()

    def waiting(self) -> float | None:
        """The share of the time since the last call that the thread, ready to run, waited for a core.

        ``None`` if it was hardly ever ready: then that says nothing about the cores.
        """
        before, self._ran_and_waited = self._ran_and_waited, self._read()
        ran, waited = (now - then for now, then in zip(self._ran_and_waited, before, strict=True))
        return waited / (ran + waited) if ran + waited >= LEAST_NS else None

    def decide(self, part: float) -> None:
        """``part`` is what :meth:`waiting` gave for the last :data:`INTERVAL_S`."""
        if self.sleeping is None:
            self._spun_s += INTERVAL_S
            if part > CROWDED:
                self._sleep()
        else:
            self._calm_s = self._calm_s + INTERVAL_S if part < CALM else 0.0
            if self._calm_s >= self._needed_s:
                self._spin()

    def _sleep(self) -> None:
        log.info("CPU threads sleep between operators, as others need the cores")
        too_early = self._spun_s < self._needed_s
        self._needed_s = min(MAX_CALM_S, 2 * self._needed_s) if too_early else CALM_S
        self.sleeping, self._calm_s = threading.Event(), 0.0
        threading.Thread(target=self._crowd, args=(self.sleeping,), daemon=True, name="crowd").start()

    def _spin(self) -> None:
        assert self.sleeping is not None, "they sleep"
        log.info("CPU threads spin between operators, as cores are idle")
        self.sleeping.set()
        self.sleeping, self._spun_s = None, 0.0

    def _crowd(self, end: threading.Event) -> None:
        """Make a team with a thread for each core, which lives as long as this thread."""
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # free(NULL) does nothing
        self._openmp.GOMP_parallel(nothing, None, len(os.sched_getaffinity(0)), 0)
        end.wait()

    def _watch(self) -> None:
        pause = threading.Event()
        while not pause.wait(INTERVAL_S):
            part = self.waiting()
            if part is not None:
                self.decide(part)

    def _read(self) -> tuple[int, int]:
        """Nanoseconds that the watched thread has run, and has waited for a core."""
        ran, waited, _ = self._statistics.read_text().split()
        return int(ran), int(waited)


def _openmp() -> ctypes.CDLL:
    """The libgomp that torch uses."""
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "libgomp" in line}
    own = {path for path in paths if Path(path).is_relative_to(Path(torch.__file__).parent)}
    if len(own or paths) != 1:
        raise OSError(f"expected one libgomp in this process, found {sorted(paths)}")
    library = ctypes.CDLL((own or paths).pop())
    library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    return library
