"""Runs a function on several ranks of a gloo group, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from safelight.worker.parallel.ranks import Ranks, join, leave

TIMEOUT_S = 120.0


def on_ranks(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(ranks, *arguments)`` on every rank; raises what any of them raises.

    ``function`` must come from a module that was imported as ``safelight.tests.…``, so that the processes find it.
    """
    with tempfile.TemporaryDirectory() as directory:
        multiprocessing.set_forkserver_preload(["safelight.worker.replica"])
        mp.start_processes(
            _run, (size, f"{directory}/store", function, arguments), nprocs=size, start_method="forkserver"
        )


def _run(rank: int, size: int, store: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    ranks: Ranks = join(rank, size, store, torch.device("cpu"), TIMEOUT_S)
    function(ranks, *arguments)
    ranks.exchange(b"")  # what was sent last has arrived, before one is gone
    leave(ranks)
