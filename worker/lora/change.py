"""Changes of whole weights and biases; this rank adds its part when the adapter is merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from ..weights.checkpoint.layout import Layout
from .files import WholeChange
from .whole import Whole


class Change(Protocol):
    """A change of ``layer`` that is added to the tensor ``weight``, by its name in the checkpoint."""

    @property
    def weight(self) -> str: ...

    @property
    def layer(self) -> str: ...

    @property
    def kind(self) -> str: ...

    def added(self, base: torch.Tensor, strength: float) -> torch.Tensor:
        """The change of this rank's part of the tensor, which is ``base`` without adapters; float32, on any device."""

    def tensors(self) -> Iterator[torch.Tensor]:
        """The tensors that it holds on the device."""


def change_of(change: WholeChange, weight: str, layout: Layout, device: torch.device) -> Change:
    """``change`` on this rank."""
    factors = {name: factor.to(device) for name, factor in change.whole.factors.items()}
    if change.whole.kind == "DoRA":
        return _decomposed(change, weight, layout, factors)
    return _Added(weight, change.layer, change.whole, factors, change.scale, change.rows, layout)


@dataclass(frozen=True, slots=True, eq=False)
class _Added:
    """A change that does not depend on the weight, computed whole from its factors when it is merged."""

    weight: str
    layer: str
    whole: Whole
    factors: Mapping[str, torch.Tensor]
    scale: float
    rows: torch.Tensor | None
    layout: Layout

    @property
    def kind(self) -> str:
        return self.whole.kind

    def added(self, base: torch.Tensor, strength: float) -> torch.Tensor:
        added = self.whole.added(self.factors)
        added = added if self.rows is None else added[self.rows.to(added.device)]
        part = self.layout.part(self.weight, added.reshape(self.layout[self.weight].shape))
        return part * (strength * self.scale)

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from self.factors.values()


@dataclass(frozen=True, slots=True, eq=False)
class _Decomposed:
    """DoRA: rows of the weight with ``up @ down`` added, each brought to its ``magnitude``.

    At any strength but 0 that is ``magnitude * (base + strength * up @ down) / norm``, as peft merges it beside no
    other adapter; several are each computed from the base. At 0 nothing is changed.
    """

    weight: str
    layer: str
    down: torch.Tensor
    up: torch.Tensor
    magnitude: torch.Tensor
    layout: Layout

    @property
    def kind(self) -> str:
        return "DoRA"

    def added(self, base: torch.Tensor, strength: float) -> torch.Tensor:
        if strength == 0:
            return torch.zeros_like(base)
        rows = base.to(self.up.device).flatten(1)  # the weights may rest on the host
        changed = rows + strength * (self.up.flatten(1) @ self.down.flatten(1))
        norm = self.layout.sum_of_rows(self.weight, changed.square().sum(dim=1)).sqrt()
        return ((self.magnitude / norm)[:, None] * changed - rows).view_as(base)

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.down, self.up, self.magnitude)


def _decomposed(change: WholeChange, weight: str, layout: Layout, factors: Mapping[str, torch.Tensor]) -> _Decomposed:
    up, magnitude = change.scale * factors["up"], factors["magnitude"]
    if change.rows is not None:
        rows = change.rows.to(up.device)
        up, magnitude = up[rows], magnitude[rows]
    down, up = layout.factors(weight, factors["down"], up)
    out, *inputs = layout[weight].shape
    whole = magnitude.view(out, *[1] * len(inputs)).expand(out, *inputs)
    own = layout.part(weight, whole).flatten(1)[:, 0].contiguous()
    return _Decomposed(weight, change.layer, down, up, own, layout)
