"""The arguments of a block's call: the tensors in them, and the signature that calls share with a recording."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .recorder import NotRecordable

_CONSTANTS = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size})
"""Types of arguments that a recording has as they were when it was made; the signature has their values."""

Mark = tuple[Any, ...]
"""One argument's part of the signature, or one container's; hashable."""

Signature = tuple[Mark, ...]
"""Calls with equal signatures differ in the values of their tensors alone."""


@dataclass(frozen=True, slots=True, eq=False)
class Arguments:
    """``tensors`` are those on the component's device, in their order in ``args`` and ``kwargs``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[torch.Tensor]
    signature: Signature
    device: torch.device

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with others in place of :attr:`tensors`."""
        rest = iter(tensors)
        args = tuple(self._replaced(value, rest) for value in self.args)
        return args, {name: self._replaced(value, rest) for name, value in self.kwargs.items()}

    def _replaced(self, value: Any, rest: Iterator[torch.Tensor]) -> Any:
        if isinstance(value, torch.Tensor):
            return next(rest) if value.device == self.device else value
        if type(value) in (tuple, list):
            return type(value)(self._replaced(element, rest) for element in value)
        if type(value) is dict:
            return {name: self._replaced(element, rest) for name, element in value.items()}
        return value


def read_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> Arguments:
    """Raises ``NotRecordable`` for an argument that is not made of tensors, constants, tuples, lists and dicts."""
    tensors: list[torch.Tensor] = []
    marks: list[Mark] = [(len(args), *kwargs)]
    for value in args:
        _read(value, device, tensors, marks)
    for value in kwargs.values():
        _read(value, device, tensors, marks)
    return Arguments(args, kwargs, tensors, tuple(marks), device)


def _read(value: Any, device: torch.device, tensors: list[torch.Tensor], marks: list[Mark]) -> None:
    cls = type(value)
    if isinstance(value, torch.Tensor):
        marks.append(_mark(value, device, tensors))
    elif cls in _CONSTANTS:
        marks.append((cls, value))
    elif cls is tuple or cls is list:
        marks.append((cls, len(value)))
        for element in value:
            _read(element, device, tensors, marks)
    elif cls is dict:
        marks.append((cls, *value))
        for element in value.values():
            _read(element, device, tensors, marks)
    else:
        raise NotRecordable(f"it is called with a {cls.__name__}, which has no signature")


def _mark(tensor: torch.Tensor, device: torch.device, tensors: list[torch.Tensor]) -> Mark:
    if tensor.device == device:
        tensors.append(tensor)
        return (torch.Tensor, tensor.dtype, tensor.shape, tensor.stride())
    if tensor.device.type == "cpu" and tensor.ndim == 0:  # kernels take its value, not its address
        return (torch.Tensor, tensor.dtype, tensor.item())
    raise NotRecordable(f"it is called with a tensor on {tensor.device}, and its weights are on {device}")


def argument_names(function: Callable[..., Any], arguments: Arguments) -> list[str]:
    """A name for each mark of the signature, as ``hidden_states`` or ``image_rotary_emb.0``."""
    parameters = [name for name in inspect.signature(function).parameters if name != "self"]
    positional = [*parameters, *map(str, range(len(parameters), len(arguments.args)))]
    names = ["arguments"]
    for name, value in [*zip(positional, arguments.args, strict=False), *arguments.kwargs.items()]:
        _add_names(name, value, names)
    return names


def _add_names(name: str, value: Any, names: list[str]) -> None:
    names.append(name)
    if type(value) in (tuple, list):
        for index, element in enumerate(value):
            _add_names(f"{name}.{index}", element, names)
    elif type(value) is dict:
        for key, element in value.items():
            _add_names(f"{name}.{key}", element, names)


def difference(wanted: Signature, recorded: Signature, names: Sequence[str]) -> list[str]:
    """How ``wanted`` differs from ``recorded``, one sentence for each argument; ``names`` are those of ``wanted``."""
    if len(wanted) != len(recorded) or wanted[0] != recorded[0]:
        parts = f"in {len(wanted)} parts, and not {_described(recorded[0])} in {len(recorded)}"
        return [f"it has {_described(wanted[0])} {parts}"]
    return [
        f"{name} is {_described(one)} and not {_described(other)}"
        for name, one, other in zip(names, wanted, recorded, strict=True)
        if one != other
    ]


def _described(mark: Mark) -> str:
    kind, *rest = mark
    if kind is torch.Tensor:
        dtype = str(rest[0]).removeprefix("torch.")
        return f"{dtype} {list(rest[1])}" if isinstance(rest[1], torch.Size) else f"{dtype} {rest[1]}"
    if isinstance(kind, int):
        return f"{kind} positional arguments and {', '.join(map(str, rest)) or 'no others'}"
    assert isinstance(kind, type)
    if kind in (tuple, list):
        return f"a {kind.__name__} of {rest[0]}"
    return f"a dict of {', '.join(map(str, rest))}" if kind is dict else repr(rest[0])
