"""The low-rank factors that the rows of a forward have in one layer, in memory that stays where it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .factors import LoraFactors

Entry = tuple[LoraFactors | None, float]
"""An adapter's factors and strength; no factors if it does not change the layer, or if the row has fewer adapters."""


class GatheredFactors:
    """``down`` [adapters * rank, in, …] and ``up`` [adapters * rank, out], in the dtype of the layer's weight.

    If each row has its own adapters, the rows are a dimension before those. The strength is multiplied into ``up``, and
    factors of a smaller rank are padded with zeros. A change of adapters writes into the same memory; only more entries
    (rows times adapters) than ever before take other memory.
    """

    def __init__(self, path: str, layer: nn.Module, like: LoraFactors, rank: int) -> None:
        self.path = path
        self._rank = rank
        self.entry_nbytes = entry_nbytes(layer, like, rank)
        dtype = _dtype(layer, like)
        self._down = like.down.new_zeros((0, *like.down.shape[1:]), dtype=dtype)
        self._up = like.down.new_zeros((0, like.full_up.shape[0]), dtype=dtype)
        self.down, self.up = self._down, self._up

    @property
    def nbytes(self) -> int:
        return self._down.nbytes + self._up.nbytes

    def write(self, entries: Sequence[Entry], rows: int | None) -> None:
        """Replace everything by ``entries``: of ``rows`` rows one after the other, or of all rows together."""
        size = len(entries) * self._rank
        if size > len(self._up):
            self._down = self._down.new_zeros((size, *self._down.shape[1:]))
            self._up = self._up.new_zeros((size, *self._up.shape[1:]))
        self.down, self.up = self._down[:size], self._up[:size]
        self.down.copy_(torch.cat([part for factors, _ in entries for part in self._down_of(factors)]))
        self.up.copy_(torch.cat([part for entry in entries for part in self._up_of(*entry)]))
        if rows is not None:
            self.down, self.up = self.down.view(rows, -1, self.down.shape[1]), self.up.view(rows, -1, self.up.shape[1])

    def _down_of(self, factors: LoraFactors | None) -> list[torch.Tensor]:
        found = [] if factors is None else [factors.down]
        return [*found, *self._missing(factors, self._down)]

    def _up_of(self, factors: LoraFactors | None, strength: float) -> list[torch.Tensor]:
        found = [] if factors is None else [factors.full_up.flatten(1).T]
        return [*(found if strength == 1 else [up * strength for up in found]), *self._missing(factors, self._up)]

    def _missing(self, factors: LoraFactors | None, like: torch.Tensor) -> list[torch.Tensor]:
        missing = self._rank - (0 if factors is None else factors.rank)
        return [like.new_zeros((missing, *like.shape[1:]))] if missing else []


def entry_nbytes(layer: nn.Module, like: LoraFactors, rank: int) -> int:
    """Bytes of one adapter's gathered factors."""
    width = like.down.shape[1:].numel() + like.full_up.shape[0]
    return rank * width * _dtype(layer, like).itemsize


def _dtype(layer: nn.Module, like: LoraFactors) -> torch.dtype:
    """The weight's, as peft has it; beside quantized weights the factors stay in fp32."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.dtype if weight.is_floating_point() else like.down.dtype
