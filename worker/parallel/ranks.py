"""The ranks of a replica, and what they say to each other during a forward."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]  # it is documented, and not in __all__
from torch.nn import functional

from ..internals.torch import set_collective_timeout


class RankLost(BaseException):
    """A collective failed, as another rank is gone or hangs: no request's fault, and the end of this process.

    No ``except Exception`` between here and the replica's loop may take it for an error of the model.
    """


CPU = torch.device("cpu")

AGREEMENT_S = 2.0
"""For how long a rank whose forward has failed waits for the others to say that theirs has too.

They were together at the last collective, so that they come to the same failure within milliseconds; one that is in a
collective, which waits for this rank, never says it.
"""


@dataclass(slots=True)
class Traffic:
    """What this rank has put into collectives since the start: calls, and bytes of the tensors."""

    calls: int = 0
    bytes: int = 0


@dataclass(slots=True, eq=False)
class Ranks:
    """This process among the ``size`` ranks of its replica; ``group`` is ``None`` where it is alone."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    device: torch.device = CPU
    failures: dist.ProcessGroup | None = None
    """Of the same ranks, for :meth:`agree` alone: what a rank says there never meets another's next collective."""
    traffic: Traffic = field(default_factory=Traffic)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up ``tensor`` over the ranks, in place; the same bytes on every rank."""
        if self.group is not None:
            self._count(tensor)
            with _others_needed():
                if self.size > 2 and tensor.itemsize < torch.float32.itemsize:
                    self._sum_widely(tensor)
                else:
                    dist.all_reduce(tensor, group=self.group)
        return tensor

    def _sum_widely(self, tensor: torch.Tensor) -> None:
        """An all-reduce, of as many bytes, that rounds each sum once, and not at every rank that adds to it.

        Each rank is sent everyone's numbers of one part of the tensor, adds them up in fp32, and sends the sums to all.
        """
        flat = tensor.flatten()
        sent = functional.pad(flat, (0, -len(flat) % self.size))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        sums = received.view(self.size, -1).sum(dim=0, dtype=torch.float32).to(tensor.dtype)
        dist.all_gather_single(sent, sums, group=self.group)
        tensor.copy_(sent[: len(flat)].view_as(tensor))

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """``tensor`` of every rank, in the order of the ranks. All have the same shape."""
        if self.group is None:
            return [tensor]
        self._count(tensor)
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with _others_needed():
            dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return parts

    def exchange(self, value: bytes) -> list[bytes]:
        """``value`` of every rank, in the order of the ranks. It needs nothing of the device, which may be full."""
        if self.group is None:
            return [value]
        lengths = [int(length) for length in self.gather(torch.tensor([len(value)]))]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(value)] = torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else padded[:0]
        gathered = self.gather(padded)
        return [part[:length].numpy().tobytes() for part, length in zip(gathered, lengths, strict=True)]

    def agree(self, failure: str) -> None:
        """Return when all ranks say that the same ``failure`` has happened to them; others do not call this.

        Raises ``RankLost`` where another rank says something else, or nothing, since it then goes on, or waits in a
        collective for this one.
        """
        if self.failures is None:
            return
        said = torch.frombuffer(bytearray(hashlib.sha256(failure.encode()).digest()), dtype=torch.uint8)
        heard = [torch.empty_like(said) for _ in range(self.size)]
        try:
            dist.all_gather(heard, said, group=self.failures)
        except RuntimeError as error:
            raise RankLost(f"{failure}, on this rank and not on all others") from error
        if any(not torch.equal(other, said) for other in heard):
            raise RankLost(f"{failure}, and something else on another rank")

    def limit(self, timeout_s: float) -> None:
        """From now on a collective that takes longer than ``timeout_s`` raises; NCCL ends the process."""
        if self.group is not None:
            set_collective_timeout(self.group, timeout_s)

    def _count(self, tensor: torch.Tensor) -> None:
        self.traffic.calls += 1
        self.traffic.bytes += tensor.nbytes


@contextlib.contextmanager
def _others_needed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankLost(str(error)) from error


ALONE = Ranks()
"""A replica of one rank."""


def join(rank: int, size: int, meeting_place: str, device: torch.device, timeout_s: float) -> Ranks:
    """Meet the other ranks: gloo for tensors on CPUs, and NCCL beside it for those on CUDA devices.

    ``meeting_place`` is a path that no file lies at yet, the same for all ranks of this start. A collective that takes
    longer than ``timeout_s`` raises, since a rank is then gone or hangs.
    """
    if size == 1:
        return ALONE
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the ranks of a replica share a machine
    store = FileStore(meeting_place, size)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )
    failures = dist.new_group(backend="gloo")
    set_collective_timeout(failures, AGREEMENT_S)  # not for meeting in it
    return Ranks(rank, size, dist.group.WORLD, device, failures)


def leave(ranks: Ranks) -> None:
    """End the group's background threads and connections."""
    if ranks.group is not None:
        dist.destroy_process_group()
