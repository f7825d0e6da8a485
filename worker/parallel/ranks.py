"""The ranks along one axis of the mesh, and their collectives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.nn import functional

from . import operators


class RankLost(BaseException):
    """A collective failed because another rank is gone or hangs. It ends this process and blames no request.

    It is a ``BaseException``, so that no ``except Exception`` below the replica's loop takes it for a model's error.
    """


CPU = torch.device("cpu")


@dataclass(slots=True)
class Traffic:
    """Counts of this rank's collectives since the start: calls, and bytes of their tensors."""

    calls: int = 0
    bytes: int = 0


@dataclass(slots=True, eq=False, weakref_slot=True)
class Ranks:
    """This process as ``rank`` of the ``size`` ranks along one axis of the mesh, or of the whole replica.

    ``group`` is ``None`` if the process is alone. Compiled code has the collectives as :mod:`.operators`, which know
    the ranks by their axis's ``name``.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    device: torch.device = CPU
    name: str = "world"
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        if self.group is not None:
            operators.register(self.name, self)

    def __deepcopy__(self, _: dict[int, object]) -> Ranks:
        return self  # a copy of a layer belongs to the same process

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up ``tensor`` over the ranks, in place; the same bytes on every rank."""
        if self.group is None:
            return tensor
        if torch.compiler.is_dynamo_compiling():
            operators.all_reduce(tensor, self.name)
        elif operators.is_played():
            tensor.mul_(self.size)
        else:
            self._count(tensor)
            with _raising_rank_lost():
                if self.size > 2 and tensor.itemsize < torch.float32.itemsize:
                    self._sum_in_fp32(tensor)
                else:
                    dist.all_reduce(tensor, group=self.group)
        return tensor

    def _sum_in_fp32(self, tensor: torch.Tensor) -> None:
        """All-reduce with as many bytes, but round each sum once instead of at every rank.

        Each rank receives one part of every rank's tensor, adds these up in fp32, and sends the sums to all.
        """
        flat = tensor.flatten()
        sent = functional.pad(flat, (0, -len(flat) % self.size))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        sums = received.view(self.size, -1).sum(dim=0, dtype=torch.float32).to(tensor.dtype)
        dist.all_gather_single(sent, sums, group=self.group)
        tensor.copy_(sent[: len(flat)].view_as(tensor))

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """``tensor`` of every rank, in the order of the ranks; the shapes must be equal."""
        if self.group is None:
            return [tensor]
        if torch.compiler.is_dynamo_compiling():
            return list(operators.all_gather(tensor, self.name, self.size))
        if operators.is_played():
            return [tensor] * self.size
        self._count(tensor)
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with _raising_rank_lost():
            dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return parts

    def exchange(self, tensor: torch.Tensor) -> torch.Tensor:
        """Send part ``i`` of ``tensor``, which is divided equally, to rank ``i``; the parts for this rank come back."""
        assert self.group is not None
        if torch.compiler.is_dynamo_compiling():
            exchanged: torch.Tensor = operators.exchange(tensor, self.name)
            return exchanged
        tensor = tensor.contiguous()
        if operators.is_played():
            own = tensor.reshape(-1).chunk(self.size)[self.rank]
            return own.repeat(self.size).view(tensor.shape)
        self._count(tensor)
        received = torch.empty_like(tensor)
        with _raising_rank_lost():
            dist.all_to_all_single(received.view(-1), tensor.view(-1), group=self.group)
        return received

    def all_gather_bytes(self, value: bytes) -> list[bytes]:
        """``value`` of every rank, in the order of the ranks. Uses host memory only, because the device may be full."""
        if self.group is None:
            return [value]
        lengths = [int(length) for length in self.all_gather(torch.tensor([len(value)]))]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(value)] = torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else padded[:0]
        gathered = self.all_gather(padded)
        return [part[:length].numpy().tobytes() for part, length in zip(gathered, lengths, strict=True)]

    def _count(self, tensor: torch.Tensor) -> None:
        self.traffic.calls += 1
        self.traffic.bytes += tensor.nbytes


@contextlib.contextmanager
def _raising_rank_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankLost(str(error)) from error


ALONE = Ranks()
"""The only rank of an axis or of a replica."""
