"""Collates the arguments of several calls into one, and uncollates the output into one result per call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.utils import _pytree as pytree

from .signature import Batchable, Role

MAX_PARTS = 1000
"""Parts for which ``RowParts`` remembers whether their elements are rows; it then clears them and learns them again."""

Path = tuple[int, ...]
"""The position of a part in an output: the child's index at each level."""


class NotDivisible(Exception):
    """A part of an output belongs to no row."""


def collate(parts: Sequence[Batchable]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of one call that has the rows of all ``parts``. Their signatures are equal."""
    columns = zip(*(part.leaves for part in parts), strict=True)
    leaves = [_join(list(column), role, parts) for column, role in zip(columns, parts[0].roles, strict=True)]
    return parts[0].structure.arguments(leaves)


class RowParts:
    """Remembers which parts of outputs (lists, tensors and arrays) have one element per row.

    In a merged output such a part (a safety checker's flags) is as long as there are rows, but another part (residuals
    or weights of as many levels) may be as long by chance. A call with fewer rows tells the two apart: only the first
    is shorter. A tensor with rows of the primary argument's shape needs no such call.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Hashable, Path], bool] = {}

    def uncollate(self, output: Any, parts: Sequence[Batchable], first_alone: Callable[[], Any]) -> list[Any]:
        """Cut the ``output`` of a merged call into what each part's own call would have returned.

        ``first_alone`` runs the first part's call alone; it is called when a part is ambiguous. Raises
        ``NotDivisible`` when a part of ``output`` does not have one row per row of the call.
        """
        return _Cut(parts, self, first_alone).cut(output, ())

    def knows(self, form: Hashable, path: Path) -> bool | None:
        return self._known.get((form, path))

    def learn(self, form: Hashable, path: Path, has_rows: bool) -> None:
        if len(self._known) == MAX_PARTS:
            self._known.clear()
        self._known[form, path] = has_rows


class _Cut:
    """One merged output being cut."""

    def __init__(self, parts: Sequence[Batchable], known: RowParts, first_alone: Callable[[], Any]) -> None:
        ends = list(accumulate(part.rows for part in parts))
        self._rows = [slice(end - part.rows, end) for part, end in zip(parts, ends, strict=True)]
        self._total: int = ends[-1]
        self._first = parts[0]
        self._known = known
        self._first_alone = first_alone
        self._seen_alone: list[Any] = []

    def cut(self, node: Any, path: Path) -> list[Any]:
        """The share of each part in ``node``, which is at ``path`` in the output."""
        if node is None:
            return [None for _ in self._rows]
        if isinstance(node, torch.Tensor | np.ndarray):
            return self._cut_array(node, path)
        if type(node) is DiagonalGaussianDistribution:
            parameters = self._cut_array(node.parameters, path)
            return [DiagonalGaussianDistribution(rows, deterministic=node.deterministic) for rows in parameters]
        if type(node) in (list, tuple) and len(node) == self._total and self._has_rows(node, path):
            return [node[rows] for rows in self._rows]
        if type(node) in (list, tuple) and node:
            columns = [self.cut(child, (*path, index)) for index, child in enumerate(node)]
            return [type(node)(shares) for shares in zip(*columns, strict=True)]
        children, spec = _children(node)
        if spec.is_leaf():
            raise NotDivisible(f"{node!r:.40} belongs to no row" if _is_plain(node) else f"a {type(node).__name__}")
        columns = [self.cut(child, (*path, index)) for index, child in enumerate(children)]
        return [
            pytree.tree_unflatten([column[number] for column in columns], spec) for number in range(len(self._rows))
        ]

    def _cut_array(self, array: torch.Tensor | np.ndarray[Any, Any], path: Path) -> list[Any]:
        is_cut = array.ndim > 0 and len(array) == self._total
        if not is_cut or not (self._is_like_primary(array) or self._has_rows(array, path)):
            kind = "a tensor" if isinstance(array, torch.Tensor) else "an array"
            raise NotDivisible(f"{kind} of shape {tuple(array.shape)} among {self._total} rows")
        return [array[rows] for rows in self._rows]

    def _is_like_primary(self, array: torch.Tensor | np.ndarray[Any, Any]) -> bool:
        """True if each element has the shape of a row of the primary argument, as denoisers' outputs have."""
        return tuple(array.shape[1:]) == self._first.row_shape

    def _has_rows(self, merged: Any, path: Path) -> bool:
        """True if the elements of ``merged``, which has as many as there are rows, are the rows' own."""
        known = self._known.knows(self._first.form, path)
        if known is not None:
            return known
        alone = self._alone_at(path)
        if type(alone) is DiagonalGaussianDistribution:
            alone = alone.parameters
        length = _length(alone) if type(alone) is type(merged) else None
        if length not in (self._first.rows, self._total):
            raise NotDivisible(f"a {type(merged).__name__} that a call alone returns in another form")
        has_rows = length == self._first.rows
        self._known.learn(self._first.form, path, has_rows)
        return has_rows

    def _alone_at(self, path: Path) -> Any:
        """The part at ``path`` in the output of the first part's call, run alone."""
        if not self._seen_alone:
            self._seen_alone.append(self._first_alone())
        node = self._seen_alone[0]
        for index in path:
            children, _ = _children(node)
            if index >= len(children):
                return None
            node = children[index]
        return node


def _children(node: Any) -> tuple[list[Any], pytree.TreeSpec]:
    root = [node]
    children, spec = pytree.tree_flatten(node, is_leaf=lambda inner: inner is not root[0])
    root.clear()  # the function is part of a reference cycle, and would keep the output until the next collection
    return children, spec


def _length(part: Any) -> int | None:
    """How many elements it has; ``None`` for a number that is an array."""
    return None if isinstance(part, torch.Tensor | np.ndarray) and part.ndim == 0 else len(part)


def _is_plain(node: Any) -> bool:
    return isinstance(node, str | int | float | bool)


def _join(column: list[Any], role: Role, parts: Sequence[Batchable]) -> Any:
    if role is Role.BATCHED:
        return torch.cat(column)
    if role is Role.SCALAR:
        return torch.cat([leaf.expand(part.rows) for leaf, part in zip(column, parts, strict=True)])
    if role is Role.LISTED:
        return [element for leaf in column for element in leaf]
    return column[0]
