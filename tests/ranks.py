"""Runs a function on several ranks of a gloo group, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
import torch.multiprocessing as mp

from safelight.worker.parallel.mesh import Mesh, join, leave

TIMEOUT_S = 120.0


def on_ranks(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(ranks, *arguments)`` on every rank of a tensor-parallel axis; raises what any of them raises."""
    on_mesh({"tp": size}, _on_axis, function, arguments)


def on_cpu(rank: int) -> torch.device:
    return torch.device("cpu")


def on_mesh(
    sizes: Mapping[str, int],
    function: Callable[..., None],
    *arguments: Any,
    device_of: Callable[[int], torch.device] = on_cpu,
) -> None:
    """Call ``function(mesh, *arguments)`` on every rank of a mesh with these axes; raises what any of them raises.

    ``function`` must come from a module that was imported as ``safelight.tests.…``, so that the processes find it. So
    must ``device_of``, which each process calls with its rank before anything else.
    """
    with tempfile.TemporaryDirectory() as directory:
        multiprocessing.set_forkserver_preload(["safelight.worker.rank.rank_process"])
        mp.start_processes(
            _run,
            (dict(sizes), f"{directory}/store", device_of, function, arguments),
            nprocs=prod(sizes.values()),
            start_method="forkserver",
        )


def _run(
    rank: int,
    sizes: Mapping[str, int],
    store: str,
    device_of: Callable[[int], torch.device],
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    device = device_of(rank)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    mesh = join(rank, sizes, store, device, TIMEOUT_S)
    function(mesh, *arguments)
    mesh.world.all_gather_bytes(b"")  # what was sent last has arrived, before one is gone
    leave(mesh)


def _on_axis(mesh: Mesh, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    function(mesh.tp, *arguments)
