"""Equality of nested tensors and plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def equal(one: Any, other: Any) -> bool:
    """Compare tensors (shape and elements), plain values, and mappings, lists and tuples of them."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(equal(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and bool(one == other)
