"""The low-rank factors of one layer on this rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class LoraFactors:
    """The change of one layer by an adapter, ``up @ down``, in fp32.

    ``weight`` is the name of the layer's weight in the checkpoint. ``down`` and ``up`` are this rank's: their product
    is this rank's part of the weight's change. ``full_up`` is of all output features, where the layer gives every rank
    all of them.
    """

    weight: str
    down: torch.Tensor
    up: torch.Tensor
    full_up: torch.Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def added(self, base: torch.Tensor, strength: float) -> torch.Tensor:
        """The change of this rank's part of the weight, in fp32, in the weight's shape."""
        product = self.up.flatten(1) @ self.down.flatten(1)
        return product.mul_(strength).view(self.up.shape[0], *self.down.shape[1:])

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.down, self.up, self.full_up)
