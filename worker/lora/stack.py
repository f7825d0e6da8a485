"""The factors of many adapters for one layer, in two tensors that stay where they are when adapters change."""

from __future__ import annotations

import torch
from torch import nn

from .factors import LoraFactors


class FactorStack:
    """``down`` [slots, rank, in, …] and ``up`` [slots, rank, out], in the dtype of the layer's weight.

    Slot 0 is zeros, for rows without adapters. Factors of a smaller rank are padded with zeros.
    """

    def __init__(self, path: str, layer: nn.Module, factors: LoraFactors, rank: int, slots: int) -> None:
        self.path = path
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        dtype = weight.dtype if weight.is_floating_point() else factors.down.dtype
        self.down = factors.down.new_zeros((slots, rank, *factors.down.shape[1:]), dtype=dtype)
        self.up = factors.down.new_zeros((slots, rank, factors.full_up.shape[0]), dtype=dtype)

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes

    def grow(self, slots: int) -> None:
        """Have room for ``slots``, in other memory."""
        if slots > len(self.down):
            self.down, self.up = _grown(self.down, slots), _grown(self.up, slots)

    def write(self, slot: int, factors: LoraFactors | None) -> None:
        """Replace what is in ``slot``, by zeros where an adapter has nothing for the layer."""
        self.down[slot].zero_()
        self.up[slot].zero_()
        if factors is not None:
            self.down[slot, : factors.rank] = factors.down
            self.up[slot, : factors.rank] = factors.full_up.flatten(1).T


def _grown(tensor: torch.Tensor, slots: int) -> torch.Tensor:
    grown = tensor.new_zeros((slots, *tensor.shape[1:]))
    grown[: len(tensor)] = tensor
    return grown
