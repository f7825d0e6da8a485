"""The distance of a component's outputs from a reference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .report import Distance


def distance(outputs: Sequence[torch.Tensor], references: Sequence[torch.Tensor]) -> Distance:
    """The distance over all pairs together, computed in fp64. Shapes match pairwise, and not all tensors are empty."""
    found, wanted = (torch.cat([tensor.double().flatten() for tensor in side]) for side in (outputs, references))
    if not bool(torch.isfinite(found).all() and torch.isfinite(wanted).all()):
        nowhere = {"cosine": math.nan, "bias": math.nan}
        return Distance(relative_l2=math.inf, max_abs=math.inf, rms=math.inf, finite=False, **nowhere)
    difference = found - wanted
    return Distance(
        cosine=_cosine(found, wanted),
        relative_l2=float(difference.norm()) / (float(wanted.norm()) or 1.0),
        max_abs=float(difference.abs().max()),
        rms=float(difference.square().mean().sqrt()),
        bias=float(difference.mean()),
        finite=True,
    )


def _cosine(found: torch.Tensor, wanted: torch.Tensor) -> float:
    both = float(found.norm() * wanted.norm())
    return float(found @ wanted) / both if both else 1.0
