"""Ranks that work together, and what they exchange during a forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.nn import functional


class RankLost(BaseException):
    """A collective failed, as another rank is gone or hangs: no request's fault, and the end of this process.

    No ``except Exception`` between here and the replica's loop may take it for an error of the model.
    """


CPU = torch.device("cpu")


@dataclass(slots=True)
class Traffic:
    """What this rank has put into collectives since the start: calls, and bytes of the tensors."""

    calls: int = 0
    bytes: int = 0


@dataclass(slots=True, eq=False)
class Ranks:
    """This process among the ``size`` ranks along one axis of the mesh, or among all of the replica.

    ``group`` is ``None`` where it is alone.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    device: torch.device = CPU
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
"""An axis of one rank, or a replica."""
