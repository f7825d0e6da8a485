"""NCCL on played devices: gloo's collectives on the same memory."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from .record import RECORD
from .tags import on_host

_COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_single", "all_gather_into_tensor", "all_to_all_single", "broadcast",
    "reduce_scatter_tensor", "send", "recv", "isend", "irecv", "batch_isend_irecv",
)  # fmt: skip


def install_nccl() -> None:
    dist.init_process_group = _over_gloo(dist.init_process_group)
    dist.new_group = _over_gloo(dist.new_group)
    for name in _COLLECTIVES:
        if name in vars(dist):
            setattr(dist, name, _hosted(name, vars(dist)[name]))
    dist.ProcessGroupNCCL = PlayedNCCL  # type: ignore[misc, attr-defined]


def _over_gloo(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with gloo in place of every backend that names NCCL."""

    @functools.wraps(function)
    def call(*args: Any, backend: Any = None, device_id: Any = None, **kwargs: Any) -> Any:
        named, *others = [*args] if args and isinstance(args[0], str) else [backend, *args]
        chosen = "gloo" if named is not None and "nccl" in named else named
        return function(*others, backend=chosen, **kwargs)

    return call


def _hosted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        RECORD.operators[f"nccl {name}"] += 1
        args, kwargs = pytree.tree_map_only(torch.Tensor, on_host, (args, kwargs))
        return function(*args, **kwargs)

    return call


class PlayedNCCL:
    """``ProcessGroupNCCL`` with the methods that Safelight uses, and torch's watchdog.

    A collective that is older than the group's timeout ends the process, or only the group if that is how
    ``TORCH_NCCL_ASYNC_ERROR_HANDLING`` was set when the group was made.
    """

    class Options:
        def __init__(self, *_: Any, **__: Any) -> None:
            self._timeout = timedelta(minutes=30)

    def __init__(self, store: Any, rank: int, size: int, options: Options) -> None:
        gloo = dist.ProcessGroupGloo._Options()
        gloo._timeout = options._timeout + timedelta(seconds=1)  # later than the watchdog
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        self._aborted = False
        self._timeout_s = options._timeout.total_seconds()
        self._ends_process = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3") in ("1", "3")
        self._group = dist.ProcessGroupGloo(store, rank, size, gloo)

    def broadcast(self, tensor: torch.Tensor, root: int) -> Any:
        RECORD.operators["nccl broadcast"] += 1
        work = self._group.broadcast(on_host(tensor), root)
        watchdog = threading.Timer(self._timeout_s, self._late, [work])
        watchdog.daemon = True
        watchdog.start()
        return work

    def abort(self) -> None:
        if not self._aborted:
            self._aborted = True
            self._group.abort()

    def _late(self, work: Any) -> None:
        if work.is_completed():
            return
        if self._ends_process:
            print("the watchdog of NCCL ends this process", file=sys.stderr, flush=True)
            os.abort()
        self.abort()
