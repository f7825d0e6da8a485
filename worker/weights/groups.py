"""Process groups with a trainer, over which it broadcasts tensors: gloo between CPUs, NCCL between CUDA devices."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from ...protocol.errors import Conflict, InvalidRequest, NotFound, Unavailable
from ...protocol.operations import Broadcast, Join

TIMEOUT_S = 120.0
"""For the others to come, and for each tensor."""

_MOST = 1 << 40
"""Bytes of one tensor; more are not meant."""

SENDER = 0
"""The trainer's rank in the group."""


def meet(
    address: str, port: int, rank: int, world_size: int, group: str, backend: str, timeout_s: float = TIMEOUT_S
) -> Any:  # torch declares no common class with the collectives of its backends
    """Join the group, as the trainer does with its own rank. Returns when all have come.

    The store's keys are those of torch's own groups with this name, so either side may be made by
    ``torch.distributed``. Raises ``RuntimeError`` where the others do not come.
    """
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(address, port, world_size, is_master=rank == SENDER, timeout=timeout, wait_for_workers=False)
    own = PrefixStore(f"{group}/", store)
    if backend == "nccl":
        from torch.distributed import ProcessGroupNCCL  # not in a build without CUDA

        options = ProcessGroupNCCL.Options()
        options._timeout = timeout
        return ProcessGroupNCCL(own, rank, world_size, options)
    return ProcessGroupGloo(own, rank, world_size, timeout)


class Groups:
    """This rank's groups, by name. ``place`` is its number among all ranks of all replicas."""

    def __init__(self, place: int) -> None:
        self._place = place
        self._groups: dict[str, Any] = {}

    def join(self, asked: Join) -> None:
        """Raises ``Conflict`` where there is such a group already, and ``Unavailable`` where the others do not come."""
        if asked.group in self._groups:
            raise Conflict(f"There is a group {asked.group!r} already; destroy it first.")
        rank = asked.rank_offset + self._place
        if not SENDER < rank < asked.world_size:
            raise InvalidRequest(
                f"rank_offset {asked.rank_offset} makes this rank {rank} of {asked.world_size}; ranks from 1 on are "
                "the server's, and each of its ranks needs one.",
                field="world_size",
            )
        try:
            self._groups[asked.group] = meet(
                asked.address, asked.port, rank, asked.world_size, asked.group, asked.backend
            )
        except (RuntimeError, ValueError, ImportError) as error:
            raise Unavailable(f"The group {asked.group!r} could not be joined: {_first_line(error)}.") from error

    def leave(self, name: str) -> None:
        """Raises ``NotFound``."""
        if self._groups.pop(name, None) is None:
            raise NotFound(f"There is no group {name!r}.", field="group_name")

    def receive(self, asked: Broadcast, device: torch.device) -> dict[str, torch.Tensor]:
        """The tensors that the trainer broadcasts, in the order of the names."""
        group = self._groups.get(asked.group)
        if group is None:
            raise NotFound(f"There is no group {asked.group!r}; make it first.", field="group_name")
        received = {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, dtype, shape in zip(asked.names, map(_dtype, asked.dtypes), asked.shapes, strict=True)
        }
        try:
            for tensor in received.values():
                group.broadcast([tensor], SENDER).wait()
        except RuntimeError as error:
            raise Unavailable(f"The trainer's tensors did not come: {_first_line(error)}.") from error
        return received


def check(asked: Broadcast) -> None:
    """Raise ``InvalidRequest`` for tensors that cannot be."""
    if not len(asked.names) == len(asked.dtypes) == len(asked.shapes):
        raise InvalidRequest("names, dtypes and shapes must be lists of one length.", field="names")
    if len(set(asked.names)) != len(asked.names):
        raise InvalidRequest("A name comes twice.", field="names")
    for dtype, shape in zip(asked.dtypes, asked.shapes, strict=True):
        if any(size < 0 for size in shape) or math.prod(shape) * _dtype(dtype).itemsize > _MOST:
            raise InvalidRequest(f"There is no tensor of the shape {shape}.", field="shapes")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise InvalidRequest(f"There is no dtype {name!r}.", field="dtypes")
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
