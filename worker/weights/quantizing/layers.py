"""Quantized layers: linear layers that hold codes and a scale in place of a weight.

A layer becomes quantized by its class, at load. Its name and everything else stay, and ``weight`` is the weight that
the codes stand for, made at each use: so whatever reads a weight gets its values, in the layer's dtype.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from ...parallel.layers import GatheredColumnLinear, RowParallelLinear
from ..checkpoint.fuse import FusedLinear
from .schemes import Scheme


class QuantizedLayer(nn.Linear):
    """``codes`` [out, in] and ``scale`` [out, 1] are buffers, which move with the module and are not in checkpoints."""

    scheme: Scheme
    codes: torch.Tensor
    scale: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # it is made at each use
        return self.scheme.decode(self.codes, self.scale)


class QuantizedLinear(QuantizedLayer): ...


class QuantizedFusedLinear(QuantizedLayer, FusedLinear): ...


class QuantizedRowParallelLinear(QuantizedLayer, RowParallelLinear): ...


class QuantizedGatheredColumnLinear(QuantizedLayer, GatheredColumnLinear): ...


class DynamicLayer(QuantizedLayer):
    """Quantizes the rows of its input too, and multiplies in 8 bits."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype is torch.float64:  # the reference that compiled blocks are compared with
            return functional.linear(input, self.weight.to(input.dtype), self.bias)
        rows = input.reshape(-1, input.shape[-1])
        scale = (rows.abs().amax(dim=1, keepdim=True).float() / self.scheme.largest).clamp(min=1e-12)
        product = torch._scaled_mm(
            (rows / scale).to(self.scheme.code),
            self.codes.view(self.scheme.code).t(),
            scale_a=scale,
            scale_b=self.scale.float().t(),
            out_dtype=input.dtype,
        )
        whole = product.view(*input.shape[:-1], -1)
        return whole if self.bias is None else whole + self.bias


class DynamicLinear(DynamicLayer): ...


class DynamicFusedLinear(DynamicLayer, FusedLinear): ...


_QUANTIZED: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,
    FusedLinear: QuantizedFusedLinear,
    RowParallelLinear: QuantizedRowParallelLinear,
    GatheredColumnLinear: QuantizedGatheredColumnLinear,
}
_DYNAMIC: dict[type[nn.Module], type[QuantizedLayer]] = {nn.Linear: DynamicLinear, FusedLinear: DynamicFusedLinear}
"""Quantized classes by the exact class of the layer: the weights of other layers are also read without a call."""


def quantized_class(layer: nn.Module, scheme: Scheme) -> type[QuantizedLayer] | None:
    """The class of ``layer`` once it is quantized; ``None`` if it cannot be.

    Products of 8 bits on a GPU need sizes that are multiples of 16.
    """
    if not scheme.dynamic:
        return _QUANTIZED.get(type(layer))
    found = _DYNAMIC.get(type(layer))
    return found if isinstance(layer, nn.Linear) and not any(size % 16 for size in layer.weight.shape) else None


def become_quantized(layer: nn.Linear, cls: type[QuantizedLayer], scheme: Scheme) -> None:
    """Replace the weight by its codes."""
    codes, scale = scheme.encode(layer.weight.detach())
    del layer._parameters["weight"]
    layer.__class__ = cls
    vars(layer)["scheme"] = scheme
    layer.register_buffer("codes", codes, persistent=False)
    layer.register_buffer("scale", scale, persistent=False)
