"""Process groups with a trainer, over which it broadcasts tensors: gloo between CPUs, NCCL between CUDA devices.

The trainer is rank 0 and keeps the store; each rank of each replica is one of the others. Its side is::

    store, rank, world_size = next(rendezvous(f"tcp://{address}:{port}", 0, world_size, timeout=timeout))
    store = PrefixStore(group_name, store)
    group, _ = _new_process_group_helper(
        world_size, rank, [], backend, store, group_name=group_name, timeout=timeout
    )
    _world.pg_group_ranks[group] = {i: i for i in range(world_size)}  # torch.distributed.distributed_c10d._world

while it waits for the reply of ``/init_weights_update_group``; then, for every tensor that it has told
``/update_weights_from_distributed`` of and in the order of its names, ``broadcast(tensor, src=0, group=group)``.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from ...protocol.errors import Conflict, InvalidRequest, NotFound, Unavailable
from ...protocol.operations import Broadcast, Join
from .sign import Sign

SENDER = 0
"""The trainer's rank in the group."""

_MOST = 1 << 40
"""Bytes of one tensor; more are not meant."""

_SIGN_S = 0.5

_POLL_S = 0.0002

_LATE_S = 5.0
"""After its timeout, a backend that has not ended a broadcast by itself is not waited for."""

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class _Group:
    """``backend`` is Any as torch declares no common class with the collectives of its backends."""

    backend: Any
    device: torch.device
    timeout_s: float

    def receive(self, tensor: torch.Tensor, sign: Sign) -> None:
        """Raises ``RuntimeError`` where it does not come."""
        work = self.backend.broadcast(tensor, SENDER)
        late = time.monotonic() + self.timeout_s + _LATE_S
        while not work.is_completed():
            if time.monotonic() > late:
                raise RuntimeError(f"nothing came for {self.timeout_s:g} s")
            sign()
            time.sleep(_POLL_S)
        work.wait()


class Groups:
    """This rank's groups, by name. ``place`` is its number among all ranks of all replicas."""

    def __init__(self, place: int, device: torch.device) -> None:
        self._place = place
        self._device = device
        self._groups: dict[str, _Group] = {}
        self._joined_last: str | None = None

    def join(self, asked: Join, sign: Sign) -> None:
        """Raises ``Conflict`` where there is such a group already, and ``Unavailable`` where the others do not come."""
        self._joined_last = None
        if asked.group in self._groups:
            raise Conflict(f"There is a group {asked.group!r} already; destroy it first.")
        if asked.backend == "nccl" and self._device.type != "cuda":
            raise InvalidRequest("This server computes on the CPU, where the backend is gloo.", field="backend")
        device = _CPU if asked.backend == "gloo" else self._device
        try:
            backend = _meanwhile(sign, lambda: _meet(asked, asked.rank_offset + self._place))
        except (RuntimeError, ValueError, OSError) as error:
            raise Unavailable(
                f"The group {asked.group!r} of {asked.world_size} could not be joined within {asked.timeout_s:g} s: "
                f"{_first_line(error)}."
            ) from error
        self._groups[asked.group] = _Group(backend, device, asked.timeout_s)
        self._joined_last = asked.group

    def forget_join(self) -> None:
        """Another rank could not do what :meth:`join` did last."""
        if self._joined_last is not None:
            self.leave(self._joined_last)

    def leave(self, name: str) -> bool:
        """Close the group's connections, so that who waits in it is told. Returns whether there was such a group."""
        group = self._groups.pop(name, None)
        if group is not None:
            group.backend.abort()
        return group is not None

    def __contains__(self, name: str) -> bool:
        return name in self._groups

    def receive(self, asked: Broadcast, sign: Sign) -> dict[str, torch.Tensor]:
        """The tensors that the trainer broadcasts, in the order of the names. Raises ``Unavailable``."""
        group = self._groups[asked.group]
        received = {
            name: torch.empty(shape, dtype=_dtype(dtype), device=group.device)
            for name, dtype, shape in zip(asked.names, asked.dtypes, asked.shapes, strict=True)
        }
        for name, tensor in received.items():
            try:
                group.receive(tensor, sign)
            except RuntimeError as error:
                raise Unavailable(f"The trainer's {name} did not come: {_first_line(error)}.") from error
        return received

    def announced(self, asked: Broadcast) -> dict[str, torch.Tensor]:
        """The tensors that are to come, without memory. Raises ``InvalidRequest`` and ``NotFound``."""
        if asked.group not in self:
            raise NotFound(f"There is no group {asked.group!r}; make it first.", field="group_name")
        if not len(asked.names) == len(asked.dtypes) == len(asked.shapes):
            raise InvalidRequest("names, dtypes and shapes must be lists of one length.", field="names")
        if len(set(asked.names)) != len(asked.names):
            raise InvalidRequest("A name comes twice.", field="names")
        return {
            name: _announced(name, _dtype(dtype), shape)
            for name, dtype, shape in zip(asked.names, asked.dtypes, asked.shapes, strict=True)
        }


def _meet(asked: Join, rank: int) -> Any:
    """Join the group. Returns when all have come; the keys in the store are those that torch's own groups have.

    Raises ``RuntimeError`` where the others do not come.
    """
    assert SENDER < rank < asked.world_size, "the server has seen to it"
    timeout = timedelta(seconds=asked.timeout_s)
    store = TCPStore(asked.address, asked.port, asked.world_size, is_master=False, timeout=timeout)
    named = PrefixStore(f"{asked.group}/", PrefixStore(asked.group, store))
    if asked.backend == "nccl":
        from torch.distributed import ProcessGroupNCCL  # not in a build without CUDA

        nccl = ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return ProcessGroupNCCL(PrefixStore("cuda/", named), rank, asked.world_size, nccl)
    gloo = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch declares neither it nor another way
    gloo._timeout = timeout
    # not GLOO_SOCKET_IFNAME's interface: the ranks of a replica share a machine, and the trainer may be on another
    gloo._devices = [ProcessGroupGloo.create_device(hostname=_own_address(asked.address, asked.port))]
    return ProcessGroupGloo(PrefixStore("cpu/", named), rank, asked.world_size, gloo)


def _own_address(address: str, port: int) -> str:
    """This machine's, on the way to ``address``; nothing is sent. Raises ``OSError``."""
    found = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)
    family, kind, _, _, where = min(found, key=lambda one: one[0] != socket.AF_INET)
    with socket.socket(family, kind) as probe:
        probe.connect(where)
        return str(probe.getsockname()[0])


def _meanwhile(sign: Sign, call: Callable[[], Any]) -> Any:
    """What ``call`` returns, which may take long."""
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(call)
        while not result.done():
            sign()
            wait([result], _SIGN_S)
        return result.result()


def _announced(name: str, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize > _MOST:
        raise InvalidRequest(f"{name}: there is no tensor of the shape {shape}.", field="shapes")
    return torch.empty(shape, dtype=dtype, device="meta")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise InvalidRequest(f"There is no dtype {name!r}.", field="dtypes")
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
