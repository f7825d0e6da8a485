"""The structure of a call's arguments: which are values of their own, and which are containers of several.

Most arguments are tensors, plain values or lists with an element per row, which need no search for leaves.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from ..crossing.call import Call

_LEAVES = frozenset({torch.Tensor, types.NoneType, bool, int, float, str})
"""Types whose values are leaves; those of others may be."""


class Structure(NamedTuple):
    """Arguments by position, then those that have ``names``. ``specs`` has ``None`` for each that is a leaf."""

    names: tuple[str, ...]
    specs: tuple[pytree.TreeSpec | None, ...]

    def arguments(self, leaves: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, by position and by name, that have ``leaves``."""
        rest = iter(leaves)
        values = [
            next(rest) if spec is None else pytree.tree_unflatten(islice(rest, spec.num_leaves), spec)
            for spec in self.specs
        ]
        by_position = len(values) - len(self.names)
        return tuple(values[:by_position]), dict(zip(self.names, values[by_position:], strict=True))


def flatten(call: Call, is_leaf: Callable[[Any], bool] = lambda _: False) -> tuple[list[Any], Structure]:
    """The leaves of the arguments of ``call``, and their structure. A value for which ``is_leaf`` holds is a leaf."""
    leaves: list[Any] = []
    specs: list[pytree.TreeSpec | None] = []
    for value in (*call.args, *call.kwargs.values()):
        if type(value) in _LEAVES or is_leaf(value):
            leaves.append(value)
            specs.append(None)
        else:
            found, spec = pytree.tree_flatten(value, is_leaf=is_leaf)
            leaves += found
            specs.append(None if spec.is_leaf() else spec)
    return leaves, Structure((*call.kwargs,), (*specs,))
