"""Adapted layers: a layer's own forward, and what adapters add to its output.

A layer becomes adapted by its class alone. It stays the same module, with the same parameters under the same names, so
that layouts, updates, forks and hooks find what they know; and it is exactly what it was when its class is put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from ..crossing.overlay import Overlay, base_class
from ..parallel.layers import GatheredColumnLinear, RowParallelLinear
from ..weights.checkpoint.fuse import FusedPart
from ..weights.quantizing.layers import (
    DynamicLinear,
    QuantizedGatheredColumnLinear,
    QuantizedLinear,
    QuantizedRowParallelLinear,
)
from .gathered import GatheredFactors
from .rows import ActiveRows, Kind

LORA = "lora"
"""The one attribute that an adapted layer has and its base has not."""


@dataclass(slots=True, eq=False)
class LayerLora:
    """An adapted layer reads the ``gathered`` factors of the active rows.

    A component's layers share ``active``. ``paths`` are the layer's names in the component.
    """

    active: ActiveRows
    paths: list[str] = field(default_factory=list)
    gathered: dict[Kind, GatheredFactors] = field(default_factory=dict)


class AdaptedLayer(Overlay):
    """Stands before a layer's class, and adds to the output of its forward."""

    overlay_attribute = LORA
    lora: LayerLora

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = super().forward(input)
        for rows in self.lora.active.now:
            if (factors := self.lora.gathered.get(rows.kind)) is not None:
                rows.add(self, factors, input, output)
        return output


class AdaptedLinear(AdaptedLayer, nn.Linear): ...


class AdaptedRowParallelLinear(AdaptedLayer, RowParallelLinear): ...


class AdaptedGatheredColumnLinear(AdaptedLayer, GatheredColumnLinear): ...


class AdaptedFusedPart(AdaptedLayer, FusedPart): ...


class AdaptedQuantizedLinear(AdaptedLayer, QuantizedLinear): ...


class AdaptedQuantizedRowParallelLinear(AdaptedLayer, QuantizedRowParallelLinear): ...


class AdaptedQuantizedGatheredColumnLinear(AdaptedLayer, QuantizedGatheredColumnLinear): ...


class AdaptedDynamicLinear(AdaptedLayer, DynamicLinear): ...


class AdaptedConv1d(AdaptedLayer, nn.Conv1d): ...


class AdaptedConv2d(AdaptedLayer, nn.Conv2d): ...


class AdaptedConv3d(AdaptedLayer, nn.Conv3d): ...


_ADAPTED: dict[type[nn.Module], type[AdaptedLayer]] = {
    adapted.__bases__[1]: adapted
    for adapted in (
        AdaptedLinear,
        AdaptedRowParallelLinear,
        AdaptedGatheredColumnLinear,
        AdaptedFusedPart,
        AdaptedQuantizedLinear,
        AdaptedQuantizedRowParallelLinear,
        AdaptedQuantizedGatheredColumnLinear,
        AdaptedDynamicLinear,
        AdaptedConv1d,
        AdaptedConv2d,
        AdaptedConv3d,
    )
}
"""Adapted classes by the exact class of the layer: the weights of other layers are also read without a call."""


def is_adaptable(layer: nn.Module) -> bool:
    return base_class(layer) in _ADAPTED


def adaptable_layers(component: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer of ``component`` that can be adapted, under each of its names."""
    for path, layer in component.named_modules(remove_duplicate=False):
        if is_adaptable(layer):
            yield path, layer


def swap_in(layer: nn.Module, lora: LayerLora) -> None:
    layer.__class__ = _ADAPTED[base_class(layer)]
    vars(layer)[LORA] = lora


def swap_out(layer: nn.Module) -> None:
    if isinstance(layer, AdaptedLayer):
        del vars(layer)[LORA]
        layer.__class__ = base_class(layer)  # type: ignore[assignment]  # which is of a layer without adapters
