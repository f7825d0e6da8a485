"""OpenMP's threads spin or sleep between operators, which shows in how often the kernel puts one to sleep."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from safelight.worker.rank.spinning import CALM_S, CROWDED, Spinning

pytestmark = pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel must count waiting times")

_PROGRAM = """
import json, os, threading, time, torch
from safelight.worker.rank.spinning import Spinning
torch.set_num_threads(2)
x = torch.zeros(2)
others = set(os.listdir("/proc/self/task"))
x = torch.zeros(512, 512)
(helper,) = set(os.listdir("/proc/self/task")) - others
spinning = Spinning()

def slept():
    with open(f"/proc/self/task/{helper}/status") as status:
        return int(next(line for line in status if line.startswith("voluntary")).split()[1])

def slept_during_operators():
    before = slept()
    for _ in range(1000):
        x * 2
    return slept() - before

found = [slept_during_operators()]
for part, count in ((0.5, 1), (0.0, 5), (0.5, 1), (0.0, 5), (0.0, 5)):
    for _ in range(count):
        spinning.decide(part)
    time.sleep(0.2)  # the team forms, or ends, in a thread of its own
    found.append(slept_during_operators())
print(json.dumps(found))
"""


def test_threads_spin_while_cores_are_idle_and_sleep_while_others_need_them() -> None:
    assert CALM_S == 5
    environment = {name: value for name, value in os.environ.items() if "OMP" not in name}
    result = subprocess.run([sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, check=True)
    counts = [int(part) for part in result.stdout.decode().strip("[]\n").split(",")]
    spun, slept, spun_again, slept_again, too_early, spun_at_last = counts
    assert max(spun, spun_again, spun_at_last) * 3 < min(slept, slept_again, too_early), counts


def test_another_s_need_of_the_core_is_noticed() -> None:
    """A thread that shares its core with a busy process waits for it about half of its time."""
    cores = os.sched_getaffinity(0)
    found: list[float | None] = []

    def compute() -> None:
        os.sched_setaffinity(0, {min(cores)})
        spinning = Spinning()
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            pass
        found.append(spinning.waiting())

    other = subprocess.Popen(["taskset", "-c", str(min(cores)), "sh", "-c", "while :; do :; done"])
    try:
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
    finally:
        other.kill()
        other.wait()
    assert found[0] is not None
    assert found[0] > CROWDED


def test_a_thread_that_hardly_runs_decides_nothing() -> None:
    """The loop of a server without requests wakes now and then, and may wait for a core just then."""
    spinning = Spinning()
    time.sleep(0.05)
    assert spinning.waiting() is None


def test_threads_that_spun_too_early_wait_longer_the_next_time_only() -> None:
    spinning = Spinning()

    def calm_seconds_until_they_spin() -> int:
        for seconds in range(100):
            if spinning.sleeping is None:
                return seconds
            spinning.decide(0.0)
        raise AssertionError("they sleep on")

    found = []
    for spun_s in (0, 0, 0, 60):
        for _ in range(spun_s):
            spinning.decide(0.0)
        spinning.decide(1.0)
        found.append(calm_seconds_until_they_spin())
    assert found == [5, 10, 20, 5]
