"""Schemes of quantization: how a weight [out, in] becomes codes of one byte and a scale for each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Scheme:
    """``largest`` is the largest magnitude of a code. Codes are stored as ``stored``, a type that no cast changes.

    With ``dynamic``, inputs are quantized too, each row by itself, and multiplied in 8 bits.
    """

    name: str
    code: torch.dtype
    stored: torch.dtype
    largest: float
    dynamic: bool = False

    def encode(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [out, in] and scale [out, 1], which has the weight's dtype: codes are made for the rounded scale.

        A GPU makes the same bits: torch divides by a tensor there as on a CPU, but by a number through its reciprocal.
        """
        wide = weight.float()
        largest = wide.abs().amax(dim=1, keepdim=True)
        scale = (largest / torch.full_like(largest, self.largest)).to(weight.dtype)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # a row of zeros
        codes = (wide / scale.float()).clamp(-self.largest, self.largest)
        if self.code == torch.int8:
            return codes.round().to(torch.int8), scale
        return codes.to(self.code).view(self.stored), scale

    def decode(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The weight, in the scale's dtype."""
        return codes.view(self.code).to(scale.dtype) * scale


_FP8 = torch.float8_e4m3fn
_LARGEST_FP8 = torch.finfo(_FP8).max

SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", torch.int8, torch.int8, 127.0),
        Scheme("fp8", _FP8, torch.uint8, _LARGEST_FP8),
        Scheme("fp8-dynamic", _FP8, torch.uint8, _LARGEST_FP8, dynamic=True),
    )
}
"""Schemes by the name that ``--quantize`` takes."""
