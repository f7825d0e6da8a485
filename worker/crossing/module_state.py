"""What a component's modules hold besides code, piece by piece: attributes, sub-modules, hooks, configuration, weights.

A pipeline may write to any of it during a call. Each piece is opened before and closed after what may write to it.
Closing puts back what was there and keeps what was written, and the next opening shows that again. Weights are referred
to, never copied: of a cast only the dtype is kept, and it is made anew from the weights of then.
"""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import is_
from typing import Any, Protocol

import torch
from torch import nn

_ABSENT, _UNCHANGED = object(), object()

_VALUES = (bool, int, float, str)
"""Types whose equal values are the same for any purpose."""

_STATELESS = frozenset({type(None), bool, int, float, str, tuple, torch.dtype, torch.device, torch.Size})
"""Types of most attributes, of which nothing is a piece."""

_OPAQUE = (
    nn.Module,
    torch.Tensor,
    torch.Generator,
    type,
    types.FunctionType,
    types.MethodType,
    types.ModuleType,
    partial,
)
"""Objects that are no state of their holder: code, and what is a piece of its own."""

_SMALL = 1 << 20
"""Bytes of a buffer that is copied before something may write to it."""

_FOREIGN = frozenset({"torch", "safelight", "builtins", "functools", "logging", "weakref", "enum", "_thread"})
"""Packages whose objects no pipeline writes to."""


class Piece(Protocol):
    """Something with state, shared by requests."""

    @property
    def target(self) -> object: ...

    def open(self) -> None:
        """Show what was kept; what is there now will be put back."""

    def close(self) -> bool:
        """Put back what was there, keep what was written, and say whether there is any."""


@dataclass(frozen=True, slots=True)
class _Cast:
    """A tensor's own values in another dtype or place."""

    dtype: torch.dtype
    device: torch.device

    def of(self, there: torch.Tensor) -> torch.Tensor:
        return there.to(self.device, self.dtype)


@dataclass(frozen=True, slots=True)
class _Values:
    """Other values than the tensor's."""

    tensor: torch.Tensor

    def of(self, _: torch.Tensor) -> torch.Tensor:
        return self.tensor


_Written = (_Cast, _Values)


class Mapping:
    """A dictionary: the attributes of a module or an object, or one of its tables (sub-modules, hooks)."""

    def __init__(self, target: dict[Any, Any]) -> None:
        self.target = target
        self._before: dict[Any, Any] | None = None
        self._own: dict[Any, Any] = {}

    def open(self) -> None:
        if self._before is None or self._own:
            self._before = dict(self.target)
        for name, value in self._own.items():
            _put(self.target, name, value.of(self._before[name]) if isinstance(value, _Written) else value)

    def close(self) -> bool:
        before, now = self._before, self.target
        assert before is not None, "opened"
        # dict's own methods, which are much faster than those of an ordered dictionary
        if (
            len(before) == len(now)
            and all(map(is_, before.values(), dict.values(now)))
            and all(map(is_, before, dict.__iter__(now)))
        ):
            self._own = {}
            return False
        pairs = {name: (before.get(name, _ABSENT), now.get(name, _ABSENT)) for name in {**before, **now}}
        own = {name: _learnt(*pair) for name, pair in pairs.items() if not _same(*pair)}
        self._own = {name: value for name, value in own.items() if value is not _UNCHANGED}
        for name in list(now):
            _put(now, name, _ABSENT)
        for name, value in before.items():
            _put(now, name, value)
        return bool(self._own)


class Listing:
    """A list or a set among the attributes."""

    def __init__(self, target: list[Any] | set[Any]) -> None:
        self.target = target
        self._before: list[Any] = []
        self._own: list[Any] | None = None

    def open(self) -> None:
        self._before = list(self.target)
        if self._own is not None:
            self._fill(self._own)

    def close(self) -> bool:
        now = list(self.target)
        if len(now) == len(self._before) and all(map(is_, now, self._before)):
            self._own = None
            return False
        self._own = now
        self._fill(self._before)
        return True

    def _fill(self, values: list[Any]) -> None:
        self.target.clear()
        if isinstance(self.target, list):
            self.target.extend(values)
        else:
            self.target.update(values)


class Weight:
    """What a parameter or buffer refers to, and the values of a small buffer."""

    def __init__(self, target: torch.Tensor) -> None:
        self.target = target
        self._before = self._shown = target.data
        self._needs_gradient = self._own_gradient = target.requires_grad
        self._own: _Cast | _Values | None = None
        self._copied = _is_small_buffer(target)
        self._copy = self._before
        self._version = 0

    def open(self) -> None:
        self._before = self._shown = self.target.data
        self._needs_gradient = self.target.requires_grad
        if self._copied:
            self._copy, self._version = self._before.clone(), self.target._version
        if self._own is not None:
            self._shown = self.target.data = self._own.of(self._before)
        if self._own_gradient != self._needs_gradient:
            self.target.requires_grad_(self._own_gradient)

    def close(self) -> bool:
        now = self.target.data
        self._own_gradient = self.target.requires_grad
        if not _is_same_memory(now, self._shown):
            learnt = _learnt(self._before, now)
            self._own = None if learnt is _UNCHANGED else learnt
        elif self._copied and self._own is None and self.target._version != self._version:
            self._own = _Values(now.clone())
            now.copy_(self._copy)
        if self._own_gradient != self._needs_gradient:
            self.target.requires_grad_(self._needs_gradient)
        if not _is_same_memory(now, self._before):
            self.target.data = self._before
        self._shown = self._copy = self._before  # a cast takes memory only while it is used
        return self._own is not None or self._own_gradient != self._needs_gradient


def pieces(module: nn.Module) -> Iterator[Piece]:
    """Every piece of state of the module itself, without its sub-modules."""
    attributes = vars(module)
    yield Mapping(attributes)
    for value in attributes.values():
        if type(value) not in _STATELESS:
            yield from pieces_of_value(value)


def pieces_of_value(value: Any) -> Iterator[Piece]:
    """The state of what a module refers to: a tensor, an object such as a configuration, a table or list of them."""
    yield from _containers(value)
    parts = dict.values(value) if isinstance(value, dict) else value if type(value) in (list, set) else ()
    for one in (value, *parts):
        if isinstance(one, torch.Tensor):
            yield from _weights([one])
        elif is_stateful(one):
            attributes = vars(one)
            yield Mapping(attributes)
            for inner in attributes.values():
                yield from _containers(inner)


def is_stateful(value: object) -> bool:
    """Whether it is an object that a pipeline could write attributes to."""
    if isinstance(value, _OPAQUE) or not hasattr(value, "__dict__"):
        return False
    return type(value).__module__.split(".")[0] not in _FOREIGN


def _weights(tensors: Iterable[torch.Tensor | None]) -> Iterator[Piece]:
    for tensor in tensors:
        if tensor is not None and type(tensor.data) is torch.Tensor:
            yield Weight(tensor)


def _containers(value: Any) -> Iterator[Piece]:
    if isinstance(value, dict):
        yield Mapping(value)
    elif type(value) in (list, set):
        yield Listing(value)


def _put(target: dict[Any, Any], name: Any, value: Any) -> None:
    """Set or remove an entry, also of a frozen configuration."""
    kind: type[dict[Any, Any]] = OrderedDict if isinstance(target, OrderedDict) else dict
    if value is not _ABSENT:
        kind.__setitem__(target, name, value)
    elif name in target:
        kind.__delitem__(target, name)


def _same(one: object, other: object) -> bool:
    """Whether a pipeline that wrote ``other`` over ``one`` has changed anything."""
    if one is other:
        return True
    if type(one) is not type(other) or not isinstance(one, (*_VALUES, OrderedDict)):
        return False
    if isinstance(one, OrderedDict):
        assert isinstance(other, OrderedDict)
        return list(one) == list(other) and all(map(_same, one.values(), other.values()))
    return one == other


def _is_small_buffer(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, nn.Parameter) and tensor.nbytes <= _SMALL and not tensor.is_inference()


def _is_same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.data_ptr() == other.data_ptr()
        and one.dtype is other.dtype
        and one.device == other.device
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


def _learnt(there: Any, written: Any) -> Any:
    """What to keep of a value that was written in the place of another: of a tensor, how it follows from the other."""
    if not (type(there) is type(written) is torch.Tensor):
        return written
    if written.shape != there.shape or written.stride() != there.stride():
        return _Values(written)
    cast = _Cast(written.dtype, written.device)
    try:
        if not torch.equal(cast.of(there), written):
            return _Values(written)
    except RuntimeError:  # no memory for the cast, or no comparison of this dtype
        return _Values(written)
    return _UNCHANGED if (written.dtype, written.device) == (there.dtype, there.device) else cast
