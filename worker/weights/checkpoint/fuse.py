"""Fuses linear layers with the same input into one product, under any attention processor.

The layers stay in place as views of the fused one. The first that is called computes the product, and the others take
their parts of it, so that no processor has to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ...parallel.plan import Family, matching
from .layout import Entry


class FusedLinear(nn.Linear):
    """Several linear layers in one: ``weight`` [sum of widths, in]. Its output is kept until every part is taken."""

    widths: tuple[int, ...]

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        first = layers[0]
        self.widths = tuple(layer.out_features for layer in layers)
        bias = first.bias is not None
        device, dtype = first.weight.device, first.weight.dtype
        super().__init__(first.in_features, sum(self.widths), bias, device=device, dtype=dtype)
        self._input: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}

    def part(self, index: int, input: torch.Tensor) -> torch.Tensor:
        """Layer ``index``'s output for ``input``."""
        if self._input is not input or index not in self._parts:
            self._input = input
            self._parts = dict(enumerate(self(input).split(self.widths, dim=-1)))
        found = self._parts.pop(index)
        if not self._parts:
            self._input = None
        return found


class FusedPart(nn.Module):
    """Takes the place of a fused layer. ``weight`` and ``bias`` are views of its rows."""

    def __init__(self, whole: FusedLinear, index: int) -> None:
        super().__init__()
        self._whole = (whole,)  # a tuple, so that the fused layer is registered once, with its parent
        self._index = index
        start = sum(whole.widths[:index])
        self._rows = slice(start, start + whole.widths[index])
        self.in_features, self.out_features = whole.in_features, whole.widths[index]

    @property
    def rows(self) -> slice:
        return self._rows

    @property
    def weight(self) -> torch.Tensor:
        return self._whole[0].weight[self._rows]

    @property
    def bias(self) -> torch.Tensor | None:
        bias = self._whole[0].bias
        return None if bias is None else bias[self._rows]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._whole[0].part(self._index, input)


def fuse(module: nn.Module, family: Family, entries: list[Entry]) -> list[Entry]:
    """Fuse the layers that ``family`` names in ``module``, which has no values yet; returns the new entries."""
    moved: dict[str, Entry] = {}
    by_tensor = {entry.tensor: entry for entry in entries}
    for pattern, groups in family.fused.items():
        for path, parent in list(matching(module, pattern)):
            for group in groups:
                layers = [getattr(parent, name, None) for name in group]
                if not all(type(layer) is nn.Linear for layer in layers):
                    continue
                name = "_".join(("fused", *group))
                whole = FusedLinear([layer for layer in layers if isinstance(layer, nn.Linear)])
                setattr(parent, name, whole)
                for index, layer in enumerate(group):
                    part = FusedPart(whole, index)
                    setattr(parent, layer, part)
                    for kind in ("weight", "bias"):
                        entry = by_tensor.get(f"{path}.{layer}.{kind}")
                        if entry is not None:
                            moved[entry.name] = replace(
                                entry, tensor=f"{path}.{name}.{kind}", rows=part.rows, own=entry.tensor
                            )
    return [moved.get(entry.name, entry) for entry in entries]
