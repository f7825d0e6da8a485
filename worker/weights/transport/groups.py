"""Process groups over which a trainer broadcasts tensors: gloo between CPUs, NCCL between CUDA devices.

The trainer is rank 0 and hosts the store; every rank of every replica is another member. The trainer runs::

    store, rank, world_size = next(rendezvous(f"tcp://{address}:{port}", 0, world_size, timeout=timeout))
    store = PrefixStore(group_name, store)
    group, _ = _new_process_group_helper(
        world_size, rank, [], backend, store, group_name=group_name, timeout=timeout
    )
    _world.pg_group_ranks[group] = {i: i for i in range(world_size)}  # torch.distributed.distributed_c10d._world

while it waits for the reply of ``/init_weights_update_group``. Then it calls ``broadcast(tensor, src=0, group=group)``
for every tensor named in ``/update_weights_from_distributed``, in the order of the names.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ....protocol.errors import Conflict, InvalidRequest, NotFound, Unavailable
from ....protocol.operations import Join
from ....protocol.tensor_sources import Broadcast
from ..progress import OnProgress
from .joining import LATE_S, SENDER, Attempt, first_line

MAX_GROUPS = 32
"""Each group has threads and connections on this rank."""

_MAX_TENSOR_BYTES = 1 << 40
"""Larger tensors are refused as mistakes."""

_POLL_S = 0.0002

_LOOK_S = 0.05
"""Seconds between the leader's checks whether the other ranks have joined."""

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class _Group:
    """``backend`` is Any because torch declares no common class for the collectives of its backends."""

    number: int
    backend: Any
    device: torch.device
    timeout_s: float

    def receive(self, tensor: torch.Tensor, deadline: float) -> None:
        """Receive ``tensor`` from the trainer. Raises ``RuntimeError`` if it does not arrive."""
        work = self.backend.broadcast(tensor, SENDER)
        began = time.monotonic()
        late = min(began + self.timeout_s, deadline)
        while not work.is_completed():
            if time.monotonic() > late:
                raise RuntimeError(f"nothing arrived for {late - began:.3g} s")
            time.sleep(_POLL_S)
        work.wait()


class ProcessGroups:
    """This rank's groups, by name, and the joins in progress, by the number of their order.

    ``global_rank`` counts all ranks of all replicas. ``ended`` is called from another thread when a join has ended;
    every rank must then :meth:`settle` it in the same step. ``receive_s`` bounds the broadcasts of one update.
    """

    def __init__(
        self,
        global_rank: int,
        device: torch.device,
        *,
        ended: Callable[[], None] = lambda: None,
        receive_s: float = math.inf,
    ) -> None:
        self._global_rank = global_rank
        self._device = device
        self._ended = ended
        self._receive_s = receive_s
        self._groups: dict[str, _Group] = {}
        self._joining: dict[int, Attempt] = {}
        self._given_up: list[Attempt] = []  # their threads may still run

    def join(self, number: int, asked: Join) -> None:
        """Begin to join. Raises ``Conflict`` if the group exists or there are too many, and ``InvalidRequest``."""
        if asked.group in self or any(attempt.asked.group == asked.group for attempt in self._joining.values()):
            raise Conflict(f"The group {asked.group!r} already exists; destroy it first.")
        if len(self._groups) + len(self._joining) >= MAX_GROUPS:
            raise Conflict(f"There are {MAX_GROUPS} groups already; destroy one of them first.")
        if asked.backend == "nccl" and self._device.type != "cuda":
            raise InvalidRequest("This server computes on the CPU, where the backend is gloo.", field="backend")
        self._given_up = [attempt for attempt in self._given_up if attempt.is_alive]
        store = asked.address, asked.port
        others = [other for other in self._given_up if (other.asked.address, other.asked.port) == store]
        self._joining[number] = Attempt(asked, asked.rank_offset + self._global_rank, self._ended, others)

    def due(self) -> list[tuple[int, bool]]:
        """Joins that the ranks must now agree on, each with whether its deadline has passed."""
        now = time.monotonic()
        ended = ((number, now >= one.deadline, one.done) for number, one in self._joining.items())
        return [(number, late) for number, late, done in ended if late or done]

    @property
    def next_look_s(self) -> float:
        """Seconds until :meth:`due` may return something although nothing has woken the loop."""
        now = time.monotonic()
        waits = (_LOOK_S if one.done else max(0.0, one.deadline - now) for one in self._joining.values())
        return min(waits, default=math.inf)

    def is_joining(self, number: int) -> bool:
        return number in self._joining

    def has_joined(self, number: int, *, late: bool) -> bool:
        """True if this rank has joined. Raises ``Unavailable`` if its join has failed or is too late."""
        attempt = self._joining[number]
        if attempt.done and attempt.error is None:
            return True
        if attempt.done or late:
            asked, reason = attempt.asked, attempt.error or "not all of its members have joined"
            raise Unavailable(
                f"The group {asked.group!r} of {asked.world_size} at {asked.address}:{asked.port} could not be joined "
                f"within {asked.timeout_s:g} s: {reason}."
            )
        return False

    def settle(self, number: int) -> None:
        """Use the group from now on, because every rank has joined."""
        attempt = self._joining.pop(number)
        asked = attempt.asked
        if asked.backend == "gloo":
            self._groups[asked.group] = _Group(number, attempt.take(), _CPU, asked.timeout_s + LATE_S)
        else:
            self._groups[asked.group] = _Group(number, attempt.take(), self._device, asked.timeout_s)

    def forget(self, number: int) -> None:
        """Leave the group that order ``number`` joined or is joining, because not every rank could join."""
        if number in self._joining:
            self._give_up(number)
        for name in [name for name, group in self._groups.items() if group.number == number]:
            self.leave(name)

    def leave(self, name: str | None) -> bool:
        """Close the group, so that waiting members fail, or stop joining it; all groups if ``name`` is ``None``.

        Returns whether there was such a group.
        """
        joining = [number for number, attempt in self._joining.items() if name in (None, attempt.asked.group)]
        for number in joining:
            self._give_up(number)
        joined = [known for known in self._groups if name in (None, known)]
        for known in joined:
            self._groups.pop(known).backend.abort()
        return bool(joining or joined)

    def _give_up(self, number: int) -> None:
        attempt = self._joining.pop(number)
        attempt.give_up()
        self._given_up.append(attempt)

    def __contains__(self, name: str) -> bool:
        return name in self._groups

    def receive(self, asked: Broadcast, on_progress: OnProgress) -> dict[str, torch.Tensor]:
        """Receive the tensors that the trainer broadcasts, in the order of the names. Raises ``Unavailable``."""
        group, deadline = self._groups[asked.group], time.monotonic() + self._receive_s
        received = {
            name: torch.empty(shape, dtype=_dtype(dtype), device=group.device)
            for name, dtype, shape in zip(asked.names, asked.dtypes, asked.shapes, strict=True)
        }
        for name, tensor in received.items():
            try:
                group.receive(tensor, deadline)
            except RuntimeError as error:
                raise Unavailable(f"The trainer's {name} did not arrive: {first_line(error)}.") from error
            on_progress()
        return received

    def announced(self, asked: Broadcast) -> dict[str, torch.Tensor]:
        """The announced tensors on the meta device. Raises ``InvalidRequest`` and ``NotFound``."""
        if asked.group not in self:
            raise NotFound(f"The group {asked.group!r} does not exist; create it first.", field="group_name")
        if not len(asked.names) == len(asked.dtypes) == len(asked.shapes):
            raise InvalidRequest("names, dtypes and shapes must have equal lengths.", field="names")
        if len(set(asked.names)) != len(asked.names):
            raise InvalidRequest("names contains a name twice.", field="names")
        return {
            name: _announced(name, _dtype(dtype), shape)
            for name, dtype, shape in zip(asked.names, asked.dtypes, asked.shapes, strict=True)
        }


def _announced(name: str, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize > _MAX_TENSOR_BYTES:
        raise InvalidRequest(f"{name}: the shape {shape} is negative or larger than 1 TiB.", field="shapes")
    return torch.empty(shape, dtype=dtype, device="meta")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise InvalidRequest(f"{name!r} is not a dtype of torch.", field="dtypes")
    return found
