"""Which adapters the rows of a forward have, as adapted layers read it: the same for all rows, or others for each."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from ..forward.adapters import CannotMix
from ..parallel.layers import RowParallelLinear
from .gathered import GatheredFactors

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

Kind = tuple[int, bool]
"""The padded rank of the factors, and true if each row has its own."""


class Rows(Protocol):
    """The rows whose factors are gathered in the layers under ``kind``."""

    @property
    def kind(self) -> Kind: ...

    @property
    def form(self) -> Hashable:
        """Everything beside the factors that the layers' operators depend on."""

    def add(self, layer: nn.Module, factors: GatheredFactors, input: torch.Tensor, output: torch.Tensor) -> None:
        """Add the adapters' products to the layer's ``output``, in place. Raises ``CannotMix``."""


@dataclass(slots=True, eq=False)
class ActiveRows:
    """``now`` are the running forward's rows: one for each rank of factors, none if no row has adapters."""

    now: tuple[Rows, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Uniform:
    """The same adapters for every row."""

    kind: Kind

    @property
    def form(self) -> Hashable:
        return self.kind

    def add(self, layer: nn.Module, factors: GatheredFactors, input: torch.Tensor, output: torch.Tensor) -> None:
        down, up = factors.down.to(input.dtype), factors.up.to(input.dtype)
        if isinstance(layer, Convolution):
            low = layer._conv_forward(input, down, None)
            output.add_(torch.einsum("ro,br...->bo...", up, low))
            return
        low = functional.linear(input, down)
        if isinstance(layer, RowParallelLinear):
            low = layer.ranks.all_reduce(low)
        if output.is_contiguous():
            output.view(-1, output.shape[-1]).addmm_(low.view(-1, low.shape[-1]), up)
        else:
            output.add_(low @ up)


@dataclass(frozen=True, slots=True, eq=False)
class PerRow:
    """Other adapters for each of ``number`` rows; ``listed`` if a row is an element of a list, not of a tensor."""

    kind: Kind
    number: int
    listed: bool

    @property
    def form(self) -> Hashable:
        return self.kind, self.number, self.listed

    def add(self, layer: nn.Module, factors: GatheredFactors, input: torch.Tensor, output: torch.Tensor) -> None:
        self._check(factors.path, input)
        down, up = factors.down.to(input.dtype), factors.up.to(input.dtype)
        low = torch.bmm(input.reshape(self.number, -1, input.shape[-1]), down.mT)
        if isinstance(layer, RowParallelLinear):
            low = layer.ranks.all_reduce(low)
        if output.is_contiguous():
            output.view(self.number, -1, output.shape[-1]).baddbmm_(low, up)
        else:
            output.add_(torch.bmm(low, up).view(output.shape))

    def _check(self, path: str, input: torch.Tensor) -> None:
        """Raises ``CannotMix`` unless the input has the rows in their order, each as often as any other."""
        whole = input.ndim >= 3 and not self.listed and input.shape[0] % self.number == 0
        if input.shape[0] != self.number and not whole:
            raise CannotMix(f"{path} has an input of shape {tuple(input.shape)} for {self.number} rows")
