"""The step cache of a request: its names and thresholds."""

from __future__ import annotations

from typing import Literal

CacheRule = Literal["easycache", "teacache"]
"""How the step cache estimates that the denoiser's answer has changed."""

THRESHOLDS: dict[CacheRule, dict[str, float]] = {
    "easycache": {"off": 0.0, "balanced": 0.05, "fast": 0.15},
    "teacache": {"off": 0.0, "balanced": 0.2, "fast": 0.3},
}
"""Thresholds by name. They were chosen from ``benchmarks/results/caching.md``, which measures the embedded model."""

PATTERN = rf"^({'|'.join(THRESHOLDS['easycache'])}|0|1|0?\.[0-9]+)$"
"""A threshold as text: a name, or a number from 0 to 1."""

CHOICES = "off, balanced, fast, or a number from 0 to 1"


def threshold(value: str | float, rule: CacheRule) -> float:
    """The threshold that ``value``, a name or a number, stands for; 0 computes every forward.

    Raises ``ValueError`` for another text.
    """
    named = THRESHOLDS[rule].get(value) if isinstance(value, str) else None
    return float(value) if named is None else named


def asks_for_cache(value: str | float | None) -> bool:
    """True if a request's field asks for a step cache of its own."""
    return value is not None and threshold(value, "easycache") > 0
