"""The memory of a live server's processes, by their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from safelight.tests.live import LiveServer

ABOVE_PLATEAU = 1.02
GRANULE = 2 * 2**20
"""Bytes that an allocator takes at once: a small process cannot be measured to 2 % of itself."""


@dataclass(frozen=True, slots=True)
class Held:
    """``memory`` are bytes of a process's own, ``descriptors`` how many of them are open."""

    memory: int
    descriptors: int


Sampled = dict[str, Held]


def held(server: LiveServer) -> Sampled:
    processes = {"server": psutil.Process(server.pid), **server.children()}
    return {name: Held(one.memory_full_info().uss, one.num_fds()) for name, one in processes.items()}


def check_flat(samples: Sequence[Sampled]) -> None:
    """The last third of the run holds what the second did, after a first one in which caches fill."""
    third = len(samples) // 3
    plateau, end = samples[third : 2 * third], samples[2 * third :]
    for name in samples[-1]:
        before, after = ([sample[name] for sample in part] for part in (plateau, end))
        most = max(one.memory for one in before)
        now = min(one.memory for one in after[-3:])
        assert now <= max(ABOVE_PLATEAU * most, most + GRANULE), f"{name} grows: {_megabytes(samples, name)}"
        descriptors = [max(one.descriptors for one in part) for part in (before, after)]
        assert descriptors[1] <= descriptors[0] + 2, f"{name} leaves descriptors open: {descriptors}"


def _megabytes(samples: Sequence[Sampled], name: str) -> list[float]:
    return [round(sample[name].memory / 1e6, 1) for sample in samples]
