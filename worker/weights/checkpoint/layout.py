"""The layout: where each tensor of a checkpoint lives in a module, on this rank.

Names are those of the checkpoint, at any degree of parallelism and with or without fusing. Everything that reads or
writes weights goes through here; nothing else knows how they are divided.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ...parallel.plan import Shard
from ...parallel.ranks import ALONE, Ranks
from .copies import Pair, Triple
from .names import Names


class Sliceable(Protocol):
    """A tensor, or a file's tensor that is not read yet (safetensors' slice)."""

    def __getitem__(self, index: Any) -> torch.Tensor: ...


class Codec(Protocol):
    """A tensor that the module holds in another form than the checkpoint's: quantized."""

    @property
    def base(self) -> torch.Tensor:
        """This rank's part of the tensor, in the checkpoint's form."""

    def own(self) -> None:
        """Give ``base`` memory that may be written to."""

    def encode(self) -> None:
        """Have the module compute with ``base``."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint tensor of (whole) ``shape``.

    It is the state dict's tensor ``tensor``, or of that the rows ``rows`` where several are fused. ``shard`` is how it
    is divided among the ranks; ``None`` where each has it whole. ``own`` is the state dict's name before fusing.
    """

    name: str
    tensor: str
    shape: tuple[int, ...]
    shard: Shard | None = None
    rows: slice | None = None
    own: str | None = None


class Layout:
    """All tensors of one module, in the order of its checkpoint."""

    def __init__(self, module: nn.Module, entries: Iterable[Entry], ranks: Ranks = ALONE) -> None:
        self._module = module
        self._ranks = ranks
        self._entries = {entry.name: entry for entry in entries}
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        self._names = {entry.own or entry.tensor: entry.name for entry in self}
        self.bases: dict[str, torch.Tensor] = {}
        """This rank's part of the tensors that adapters are merged into, without the adapters."""
        self.codecs: dict[str, Codec] = {}
        """The tensors that the module holds in another form."""
        self.names = Names()
        """Other names of the module's tensors."""

    @classmethod
    def whole(cls, module: nn.Module) -> Layout:
        """The layout of a module that is neither divided nor fused."""
        return cls(module, (Entry(name, name, tuple(t.shape)) for name, t in module.state_dict().items()))

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __len__(self) -> int:
        return len(self._entries)

    def checkpoint_name(self, tensor: str) -> str | None:
        """The checkpoint's name of the state dict's ``tensor``; ``None`` where it has none."""
        return self._names.get(tensor)

    def local(self, name: str) -> torch.Tensor:
        """This rank's part of the tensor without adapters and quantization, which digests, snapshots and updates mean.

        To write to it, call :meth:`own` before and :meth:`encode` after.
        """
        if (codec := self.codecs.get(name)) is not None:
            return codec.base
        base = self.bases.get(name)
        return self.live(name) if base is None else base

    def live(self, name: str) -> torch.Tensor:
        """This rank's part of the tensor that the module computes with."""
        entry = self._entries[name]
        tensor = self._find(entry.tensor)
        return tensor if entry.rows is None else tensor[entry.rows]

    def own(self, name: str) -> None:
        """Give :meth:`local` memory that may be written to."""
        if (codec := self.codecs.get(name)) is not None:
            codec.own()

    def encode(self, name: str) -> None:
        """Have the module compute with :meth:`local`, which was written to."""
        if (codec := self.codecs.get(name)) is not None:
            codec.encode()

    def factors(self, name: str, down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's part of two factors: their product is this rank's part of ``up @ down``."""
        entry = self._entries[name]
        if entry.shard is None or self._ranks.size == 1:
            return down, up
        indices = list(self._indices(entry, self._ranks.rank))
        if entry.shard.dim == 0:
            return down, torch.cat([up[index] for index in indices])
        return torch.cat([down[index] for index in indices], dim=1), up

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of ``whole``, which has the tensor's shape."""
        pieces = self._pieces(name, whole)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=self._dim(name))

    def sum_of_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Sums over each whole row of the tensor, where ``rows`` [rows] has them over this rank's part.

        Where rows are divided, all ranks must call this together.
        """
        shard = self._entries[name].shard
        return self._ranks.all_reduce(rows) if shard is not None and shard.dim > 0 and self._ranks.size > 1 else rows

    def dtype(self, name: str) -> torch.dtype:
        return self.local(name).dtype

    @torch.no_grad()
    def write(self, name: str, whole: Sliceable) -> None:
        """Copy this rank's part of ``whole`` into the module, cast to its dtype.

        Raises ``ValueError`` where the shapes do not fit; nothing is written then.
        """
        self.own(name)
        for here, piece in self._targets(name, whole):
            here.copy_(piece)
        self.encode(name)

    def over(self, name: str, whole: Sliceable, before: torch.Tensor) -> list[Triple]:
        """Triples of a place in this rank's memory, the piece of ``whole`` that belongs there, and a place for the old.

        ``before``, which is like :meth:`local`, has the last. Raises ``ValueError`` where the shapes do not fit.
        """
        targets = self._targets(name, whole)
        kept = _split(before, [piece for _, piece in targets], self._dim(name))
        return [(here, piece, old) for (here, piece), old in zip(targets, kept, strict=True)]

    def beside(self, name: str, whole: Sliceable, buffer: torch.Tensor) -> list[Pair]:
        """Pairs of a part of ``buffer``, which is like :meth:`local`, and the piece of ``whole`` that belongs there."""
        pieces = [piece for _, piece in self._targets(name, whole)]
        return list(zip(_split(buffer, pieces, self._dim(name)), pieces, strict=True))

    def _dim(self, name: str) -> int:
        """The dimension along which the tensor is divided."""
        return 0 if (shard := self._entries[name].shard) is None else shard.dim

    def _targets(self, name: str, whole: Sliceable) -> list[Pair]:
        """Pairs of a place in this rank's memory and the piece of ``whole`` that belongs there."""
        pieces, local = self._pieces(name, whole), self.local(name)
        dim = self._dim(name)
        shape = list(pieces[0].shape)
        if len(pieces) > 1:
            shape[dim] = sum(piece.shape[dim] for piece in pieces)
        if shape != list(local.shape):
            raise ValueError(f"{name} has shape {tuple(shape)} on rank {self._ranks.rank}, not {tuple(local.shape)}")
        return list(zip(_split(local, pieces, dim), pieces, strict=True))

    @torch.no_grad()
    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, the module's own where it has it. All ranks must call this together."""
        entry, local = self._entries[name], self.local(name)
        if entry.shard is None or self._ranks.size == 1:
            return local.detach()
        own = local.detach().to(self._ranks.device).contiguous()  # also while it is offloaded
        whole = own.new_empty(entry.shape)
        for rank, part in enumerate(self._ranks.all_gather(own)):
            start = 0
            for index in self._indices(entry, rank):
                piece = whole[index]
                width = piece.shape[entry.shard.dim]
                piece.copy_(part.narrow(entry.shard.dim, start, width))
                start += width
        return whole

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every whole tensor in the order of the checkpoint, one at a time. All ranks must go through it together."""
        for name in self._entries:
            yield name, self.read(name)

    def _pieces(self, name: str, whole: Sliceable) -> list[torch.Tensor]:
        """This rank's pieces of ``whole``, along the divided dimension; of a file, only these are read."""
        entry = self._entries[name]
        if entry.shard is None:
            return [whole[...]]
        return [whole[index] for index in self._indices(entry, self._ranks.rank)]

    def _indices(self, entry: Entry, rank: int) -> Iterator[tuple[slice, ...]]:
        """The parts of the whole tensor, one for each block, that ``rank`` has."""
        assert entry.shard is not None
        start, before = 0, (slice(None),) * entry.shard.dim
        for block in entry.shard.blocks:
            width = block // self._ranks.size
            yield (*before, slice(start + rank * width, start + (rank + 1) * width))
            start += block

    def _find(self, path: str) -> torch.Tensor:
        if path not in self._owners:
            owner, _, name = path.rpartition(".")
            self._owners[path] = self._module.get_submodule(owner), name
        found: torch.Tensor = getattr(*self._owners[path])
        return found


def _split(tensor: torch.Tensor, pieces: Sequence[torch.Tensor], dim: int) -> Sequence[torch.Tensor]:
    """``tensor`` in parts of the sizes of ``pieces`` along ``dim``."""
    return [tensor] if len(pieces) == 1 else torch.split(tensor, [piece.shape[dim] for piece in pieces], dim)


def entries(whole: nn.Module, names: Sequence[tuple[str, str]], shards: dict[str, Shard]) -> list[Entry]:
    """Entries for a module before it is divided; ``names`` are pairs of checkpoint name and state dict name."""
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    return [Entry(name, tensor, shapes[tensor], shards.get(tensor)) for name, tensor in names]
