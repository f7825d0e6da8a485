"""The arguments of a block's call: what decides whether a graph fits, and a copy that the compiler may keep."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..internals import dynamo

_CONSTANTS = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device})


@dataclass(frozen=True, slots=True, eq=False)
class Arguments:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def key(self) -> Hashable:
        """Equal for calls that a graph treats alike: shapes and dtypes of tensors, and values of constants."""
        return (
            tuple(_mark(value) for value in self.args),
            tuple((name, _mark(value)) for name, value in self.kwargs.items()),
        )

    def contiguous(self) -> Arguments:
        """Activations in memory of their own order: one graph, where views of a longer sequence would need another."""
        return Arguments(
            tuple(_contiguous(value) for value in self.args),
            {name: _contiguous(value) for name, value in self.kwargs.items()},
        )

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Arguments:
        args, kwargs = pytree.tree_map_only(torch.Tensor, function, (self.args, self.kwargs))
        return Arguments(args, kwargs)

    def tensors(self) -> list[torch.Tensor]:
        return tensors((self.args, self.kwargs))

    def mark_rows(self) -> None:
        """Let the first dimension be dynamic in tensors that have the first one's; a single row stays special."""
        found = [tensor for tensor in self.tensors() if tensor.ndim > 0]
        rows = len(found[0]) if found else 0
        for tensor in found:
            if len(tensor) == rows > 1:
                dynamo.maybe_mark_dynamic(tensor, 0)


def tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _mark(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return (value.shape, value.dtype, value.is_contiguous())
    cls = type(value)
    if cls in _CONSTANTS:
        return value if cls is not bool else (bool, value)
    if cls is tuple or cls is list:
        return (cls, *map(_mark, value))
    if cls is dict:
        return (dict, *_items(value))
    return (cls,)


def _items(value: dict[Any, Any]) -> Iterator[Hashable]:
    return ((name, _mark(element)) for name, element in value.items())


def _contiguous(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.ndim < 3 or (value.is_contiguous() and len(value) > 1):
        return value
    return value.reshape(-1).view(value.shape)  # also the stride of a single row, which nothing else reads
