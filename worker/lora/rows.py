"""Which adapters the rows of a forward have, as adapted layers read it: slots and strengths, in tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from ..forward.adapters import CannotMix
from ..parallel.layers import RowParallelLinear
from .stack import FactorStack

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class Rows(Protocol):
    """Adapters whose factors are of one ``rank`` in the stacks."""

    @property
    def rank(self) -> int: ...

    def add(self, layer: nn.Module, stack: FactorStack, input: torch.Tensor, output: torch.Tensor) -> None:
        """Add the adapters' products to the layer's ``output``, in place. Raises ``CannotMix``."""


@dataclass(slots=True, eq=False)
class ActiveRows:
    """``now`` are those of the forward in hand: one for each rank of factors, none where no row has adapters."""

    now: tuple[Rows, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Uniform:
    """The same adapters for every row; ``slots`` and ``strengths`` are [adapters]."""

    rank: int
    slots: torch.Tensor
    strengths: torch.Tensor

    def add(self, layer: nn.Module, stack: FactorStack, input: torch.Tensor, output: torch.Tensor) -> None:
        down = stack.down.index_select(0, self.slots).flatten(0, 1).to(input.dtype)  # [adapters * rank, in, …]
        up = stack.up.index_select(0, self.slots).flatten(0, 1).to(input.dtype)  # [adapters * rank, out]
        if isinstance(layer, _Convolution):
            low = layer._conv_forward(input, down, None)
            _by_adapter(low, 1, self.rank).mul_(self.strengths.view(-1, *[1] * (low.ndim - 1)))
            output.add_(torch.einsum("ro,br...->bo...", up, low))
            return
        low = functional.linear(input, down)
        if isinstance(layer, RowParallelLinear):
            low = layer.ranks.all_reduce(low)
        _by_adapter(low, -1, self.rank).mul_(self.strengths[:, None])
        if output.is_contiguous():
            output.view(-1, output.shape[-1]).addmm_(low.view(-1, low.shape[-1]), up)
        else:
            output.add_(low @ up)


@dataclass(frozen=True, slots=True, eq=False)
class PerRow:
    """Other adapters for each row; ``slots`` and ``strengths`` are [rows, adapters], and fewer have slot 0.

    ``listed`` says that a row is an element of a list, and not of a tensor's first dimension.
    """

    rank: int
    slots: torch.Tensor
    strengths: torch.Tensor
    listed: bool

    def add(self, layer: nn.Module, stack: FactorStack, input: torch.Tensor, output: torch.Tensor) -> None:
        self._check(layer, stack.path, input)
        number = len(self.slots)
        down, up = (self._gathered(factors).to(input.dtype) for factors in (stack.down, stack.up))
        low = torch.bmm(input.reshape(number, -1, input.shape[-1]), down.mT)
        if isinstance(layer, RowParallelLinear):
            low = layer.ranks.all_reduce(low)
        _by_adapter(low, -1, self.rank).mul_(self.strengths[:, None, :, None])
        if output.is_contiguous():
            output.view(number, -1, output.shape[-1]).baddbmm_(low, up)
        else:
            output.add_(torch.bmm(low, up).view(output.shape))

    def _gathered(self, factors: torch.Tensor) -> torch.Tensor:
        """Those of each row's adapters, side by side: [rows, adapters * rank, in or out]."""
        return factors.index_select(0, self.slots.flatten()).view(len(self.slots), -1, factors.shape[-1])

    def _check(self, layer: nn.Module, path: str, input: torch.Tensor) -> None:
        """Raises ``CannotMix`` unless the input has the rows in their order, each as often as any other."""
        if isinstance(layer, _Convolution):
            raise CannotMix(f"{path} is a convolution")
        number = len(self.slots)
        whole = input.ndim >= 3 and not self.listed and input.shape[0] % number == 0
        if input.shape[0] != number and not whole:
            raise CannotMix(f"{path} has an input of shape {tuple(input.shape)} for {number} rows")


def _by_adapter(low: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    """A view of ``low`` with the adapters and their ranks, which are one dimension of it, as two."""
    view: torch.Tensor = low.unflatten(dim, (-1, rank))  # type: ignore[no-untyped-call]
    return view
