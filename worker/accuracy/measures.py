"""How far one output lies from another, and whether that is near enough."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

FP32_RELATIVE_L2 = 1e-5
LOW_PRECISION_FACTOR = 1.5
"""How much larger than the plain component's, beside fp64, errors may be in bf16 and fp16."""
LOW_PRECISION_BIAS = 0.25
"""Largest mean error, in units of the root mean square of the errors."""


@dataclass(frozen=True, slots=True)
class Distance:
    """Of an output from a reference: ``rms`` and ``bias`` are the root mean square and the mean of the differences."""

    cosine: float
    relative_l2: float
    max_abs: float
    rms: float
    bias: float
    finite: bool


def distance(output: torch.Tensor, reference: torch.Tensor) -> Distance:
    """Computed in fp64. Raises ``ValueError`` where the shapes differ."""
    if output.shape != reference.shape:
        raise ValueError(f"an output of shape {tuple(output.shape)} beside one of {tuple(reference.shape)}")
    found, wanted = output.double().flatten(), reference.double().flatten()
    finite = bool(torch.isfinite(found).all() and torch.isfinite(wanted).all())
    if not finite:
        return Distance(math.nan, math.inf, math.inf, math.inf, math.nan, False)
    difference = found - wanted
    norm = float(wanted.norm())
    both = float(found.norm()) * norm
    return Distance(
        cosine=float(found @ wanted) / both if both else 1.0,
        relative_l2=float(difference.norm()) / norm if norm else float(difference.norm()),
        max_abs=float(difference.abs().max()) if len(difference) else 0.0,
        rms=float(difference.square().mean().sqrt()) if len(difference) else 0.0,
        bias=float(difference.mean()) if len(difference) else 0.0,
        finite=True,
    )


def fault(runtime: Distance, plain: Distance | None) -> str | None:
    """What is wrong with the runtime's output, in a few words; ``None`` when nothing is.

    In fp32 ``runtime`` is the distance from the plain component and ``plain`` is ``None``. In lower precision both are
    distances from the reference in fp64.
    """
    if not runtime.finite:
        return "not finite"
    if plain is None:
        over = runtime.relative_l2 > FP32_RELATIVE_L2
        return f"relative L2 {runtime.relative_l2:.1e} above {FP32_RELATIVE_L2:.0e}" if over else None
    for name in ("rms", "max_abs"):
        ours, theirs = getattr(runtime, name), getattr(plain, name)
        if ours > LOW_PRECISION_FACTOR * theirs:
            return f"{name} {ours:.2e} above {LOW_PRECISION_FACTOR} times the plain component's {theirs:.2e}"
    if abs(runtime.bias) > LOW_PRECISION_BIAS * runtime.rms:
        return f"bias {runtime.bias:.2e} above {LOW_PRECISION_BIAS} of the rms {runtime.rms:.2e}"
    return None
