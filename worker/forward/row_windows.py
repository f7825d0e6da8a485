"""Windows of a forward's rows, one for each rank, and the outputs of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..parallel.ranks import Ranks
from .batch import Forward, Pending
from .signature import Batchable, Role


class NoRows(Exception):
    """An output does not consist of tensors with one element for each row."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The outputs of some rows: ``columns`` are tensors [rows, ...], or ``None``, of a tree ``spec``.

    A column that ``lists`` marks is a list of tensors in the output.
    """

    columns: list[torch.Tensor | None]
    lists: list[bool]
    spec: pytree.TreeSpec

    @property
    def form(self) -> str:
        """Equal for outputs that differ only in their numbers."""
        shapes = [None if column is None else (tuple(column.shape), column.dtype) for column in self.columns]
        return f"{shapes} {self.lists} {self.spec}"

    @classmethod
    def of(cls, parts: Sequence[Batchable], answers: Sequence[Any]) -> Rows:
        """The rows of all ``answers``, each of its part. Raises ``NoRows``."""
        trees = [_flat(answer, part) for part, answer in zip(parts, answers, strict=True)]
        spec = trees[0][1]
        columns = [_joined(list(column), parts) for column in zip(*(leaves for leaves, _ in trees), strict=True)]
        return cls(columns, [isinstance(leaf, list) for leaf in trees[0][0]], spec)

    def answers(self, parts: Sequence[Batchable]) -> list[Any]:
        """Cut into the answers of ``parts``, which have all rows."""
        sizes = [part.rows for part in parts]
        cut = [[None] * len(parts) if column is None else torch.split(column, sizes) for column in self.columns]
        return [
            pytree.tree_unflatten([self._leaf(rows[number], index) for index, rows in enumerate(cut)], self.spec)
            for number in range(len(parts))
        ]

    def _leaf(self, rows: torch.Tensor | None, index: int) -> Any:
        return list(rows) if rows is not None and self.lists[index] else rows


def have_equal_rows(parts: Sequence[Batchable]) -> bool:
    """True unless the calls have lists of inputs of different shapes, as of pictures of different sizes."""
    primary = [next((leaf for leaf in part.leaves if isinstance(leaf, list)), []) for part in parts if part.listed]
    return len({row.shape for rows in primary for row in rows}) <= 1


def _flat(answer: Any, part: Batchable) -> tuple[list[Any], pytree.TreeSpec]:
    def is_leaf(node: Any) -> bool:
        return part.listed and isinstance(node, list) and len(node) == part.rows

    return pytree.tree_flatten(answer, is_leaf=is_leaf)


def _joined(column: list[Any], parts: Sequence[Batchable]) -> torch.Tensor | None:
    """The rows of all parts in one leaf of the output."""
    if all(leaf is None for leaf in column):
        return None
    found = []
    for leaf, part in zip(column, parts, strict=True):
        rows = _stacked(leaf) if isinstance(leaf, list) else leaf
        if not isinstance(rows, torch.Tensor) or rows.ndim == 0 or len(rows) != part.rows:
            raise NoRows
        found.append(rows)
    if len({rows.shape[1:] for rows in found}) > 1:
        raise NoRows
    return torch.cat(found) if len(found) > 1 else found[0]


def _stacked(rows: list[Any]) -> torch.Tensor:
    if not all(isinstance(row, torch.Tensor) and row.shape == rows[0].shape for row in rows):
        raise NoRows
    return torch.stack(rows)


class Window:
    """The rows of this rank among ``total``. Each rank has as many, so that the last ones' may overlap."""

    def __init__(self, total: int, ranks: Ranks) -> None:
        self._total = total
        self._ranks = ranks
        self._size = -(-total // ranks.size)
        self.rows = self._of(ranks.rank)

    def _of(self, rank: int) -> slice:
        start = min(rank * self._size, self._total - self._size)
        return slice(start, start + self._size)

    def cut(self, forward: Forward) -> Forward:
        """The part of ``forward`` that has this rank's rows."""
        calls, adapters, start = [], [], 0
        for pending, part, uses in zip(forward.calls, forward.parts, forward.adapters, strict=True):
            first, end = max(self.rows.start - start, 0), min(self.rows.stop - start, part.rows)
            if first < end:
                calls.append(pending if end - first == part.rows else _cut(pending, part, slice(first, end)))
                adapters.append(uses)
            start += part.rows
        return Forward(calls, adapters, part=True)

    def whole(self, own: Rows) -> Rows:
        """All rows, from every rank's own. All ranks must call this together."""
        return Rows([None if column is None else self._gathered(column) for column in own.columns], own.lists, own.spec)

    def _gathered(self, own: torch.Tensor) -> torch.Tensor:
        gathered = self._ranks.all_gather(own)
        begin = [rank * self._size for rank in range(self._ranks.size)]
        return torch.cat(
            [
                rows[start - self._of(rank).start :]
                for rank, (start, rows) in enumerate(zip(begin, gathered, strict=True))
            ]
        )


def _cut(pending: Pending, part: Batchable, rows: slice) -> Pending:
    """A call with some rows of a call."""
    number = rows.stop - rows.start
    leaves = [
        leaf[rows] if role in (Role.BATCHED, Role.LISTED) else leaf
        for leaf, role in zip(part.leaves, part.roles, strict=True)
    ]
    args, kwargs = part.structure.arguments(leaves)
    cut = replace(part, leaves=leaves, rows=number, positions=part.positions * number // part.rows)
    return replace(pending, call=replace(pending.call, args=args, kwargs=kwargs), batchable=cut)
