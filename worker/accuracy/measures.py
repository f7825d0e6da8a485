"""How far a component's outputs lie from others'."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .report import Distance


class ShapesDiffer(Exception):
    """The outputs are not the reference's in number or shape."""


def distance(outputs: Sequence[torch.Tensor], references: Sequence[torch.Tensor]) -> Distance:
    """Computed in fp64. Raises ``ShapesDiffer``; at least one number must be there."""
    if len(outputs) != len(references):
        raise ShapesDiffer(f"{len(outputs)} tensors beside {len(references)}")
    for found, wanted in zip(outputs, references, strict=True):
        if found.shape != wanted.shape:
            raise ShapesDiffer(f"an output of shape {tuple(found.shape)} beside {tuple(wanted.shape)}")
    pairs = [(a.double().flatten(), b.double().flatten()) for a, b in zip(outputs, references, strict=True)]
    if not all(bool(torch.isfinite(a).all() and torch.isfinite(b).all()) for a, b in pairs):
        nowhere = {"cosine": math.nan, "bias": math.nan}
        return Distance(relative_l2=math.inf, max_abs=math.inf, rms=math.inf, finite=False, **nowhere)
    differences = torch.cat([a - b for a, b in pairs])
    return Distance(
        cosine=min(_cosine(a, b) for a, b in pairs),
        relative_l2=max(_relative_l2(a, b) for a, b in pairs),
        max_abs=float(differences.abs().max()),
        rms=float(differences.square().mean().sqrt()),
        bias=float(differences.mean()),
        finite=True,
    )


def _cosine(found: torch.Tensor, wanted: torch.Tensor) -> float:
    both = float(found.norm() * wanted.norm())
    return float(found @ wanted) / both if both else 1.0


def _relative_l2(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Absolute where the reference is zero."""
    return float((found - wanted).norm()) / (float(wanted.norm()) or 1.0)
