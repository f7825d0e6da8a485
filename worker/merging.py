"""Many calls into one forward, and its output back into one result for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.utils import _pytree as pytree

from .anatomy import Anatomy, Role, is_row_list


class NotSplittable(Exception):
    """An output has a part that belongs to no row."""


def merge(parts: Sequence[Anatomy]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of one call with the rows of all ``parts``, which have equal keys."""
    columns = zip(*(part.leaves for part in parts), strict=True)
    leaves = [_join(list(column), role, parts) for column, role in zip(columns, parts[0].roles, strict=True)]
    args, kwargs = pytree.tree_unflatten(leaves, parts[0].spec)
    return args, kwargs


def split(output: Any, parts: Sequence[Anatomy]) -> list[Any]:
    """``output`` of a merged call, cut into what each part's own call would have returned.

    Raises ``NotSplittable`` when a leaf has neither a row for each of the merged call's nor is plainly shared.
    """
    total = sum(part.rows for part in parts)
    listed = parts[0].listed
    leaves, spec = pytree.tree_flatten(output, is_leaf=lambda node: is_row_list(node, total, listed))
    results, start = [], 0
    for part in parts:
        rows = slice(start, start + part.rows)
        results.append(pytree.tree_unflatten([_cut(leaf, rows, total) for leaf in leaves], spec))
        start += part.rows
    return results


def _join(column: list[Any], role: Role, parts: Sequence[Anatomy]) -> Any:
    if role is Role.BATCHED:
        return torch.cat(column)
    if role is Role.SCALAR:
        return torch.cat([leaf.expand(part.rows) for leaf, part in zip(column, parts, strict=True)])
    if role is Role.LISTED:
        return [element for leaf in column for element in leaf]
    return column[0]


def _cut(leaf: Any, rows: slice, total: int) -> Any:
    if isinstance(leaf, torch.Tensor):
        if leaf.ndim == 0 or leaf.shape[0] != total:
            raise NotSplittable(f"a tensor of shape {tuple(leaf.shape)} among {total} rows")
        return leaf[rows]
    if isinstance(leaf, list):
        return leaf[rows]
    if isinstance(leaf, DiagonalGaussianDistribution):
        return DiagonalGaussianDistribution(leaf.parameters[rows], deterministic=leaf.deterministic)
    if isinstance(leaf, str | int | float | bool | None):
        return leaf
    raise NotSplittable(f"a {type(leaf).__name__}")
