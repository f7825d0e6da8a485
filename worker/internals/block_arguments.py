"""The arguments of a block's call: their tensors, and the signature that equal calls share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

_CONSTANTS = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size})
"""Types of arguments whose values belong to the signature."""

Mark = tuple[Any, ...]
"""The part of the signature of one container, or of one value in it; hashable."""

Signature = tuple[Mark, ...]
"""Calls with equal signatures differ in their tensors alone."""


@dataclass(frozen=True, slots=True, eq=False)
class Arguments:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def signature(self, mark: Callable[[Any], Mark]) -> Signature:
        """``mark`` marks each tensor, and each object that is neither a constant nor a tuple, list or dict."""
        marks: list[Mark] = [(len(self.args), *self.kwargs)]
        for value in self.args:
            _read(value, mark, marks)
        for value in self.kwargs.values():
            _read(value, mark, marks)
        return tuple(marks)

    def names(self, function: Callable[..., Any]) -> list[str]:
        """A name for each mark of the signature, as ``hidden_states`` or ``image_rotary_emb.0``, by ``function``."""
        parameters = [*inspect.signature(function).parameters]
        positional = [*parameters, *map(str, range(len(parameters), len(self.args)))]
        names = ["arguments"]
        for name, value in [*zip(positional, self.args, strict=False), *self.kwargs.items()]:
            _add_names(name, value, names)
        return names

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Arguments:
        """The same arguments with ``function`` applied to each tensor, in the order of the signature."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, function, (self.args, self.kwargs))
        return Arguments(args, kwargs)

    def tensors(self) -> list[torch.Tensor]:
        return tensors((self.args, self.kwargs))


def tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _read(value: Any, mark: Callable[[Any], Mark], marks: list[Mark]) -> None:
    cls = type(value)
    if cls in _CONSTANTS:
        marks.append((cls, value))
    elif cls is tuple or cls is list:
        marks.append((cls, len(value)))
        for element in value:
            _read(element, mark, marks)
    elif cls is dict:
        marks.append((cls, *value))
        for element in value.values():
            _read(element, mark, marks)
    else:
        marks.append(mark(value))


def _add_names(name: str, value: Any, names: list[str]) -> None:
    names.append(name)
    if type(value) in (tuple, list):
        for index, element in enumerate(value):
            _add_names(f"{name}.{index}", element, names)
    elif type(value) is dict:
        for key, element in value.items():
            _add_names(f"{name}.{key}", element, names)
