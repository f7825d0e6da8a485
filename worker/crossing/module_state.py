"""The mutable state of a component's modules, in pieces: attributes, sub-modules, hooks, configuration, weights.

A pipeline may write to any of it during a call. Each piece is opened before code that may write to it and closed after.
Closing restores the old state and keeps what was written; the next opening writes it again. Weights are referenced,
never copied: of a cast only the dtype and device are kept, and the cast is repeated from the current weights.
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
"""Types whose equal values are interchangeable."""

_STATELESS = frozenset({type(None), bool, int, float, str, tuple, torch.dtype, torch.device, torch.Size})
"""Types of most attributes; their values have no mutable state."""

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
"""Objects that are not part of their holder's state: code, and objects that have pieces of their own."""

_SMALL = 1 << 20
"""Buffers of up to this many bytes are copied before code that may write to them."""

_FOREIGN = frozenset({"torch", "safelight", "builtins", "functools", "logging", "weakref", "enum", "_thread"})
"""Packages whose objects no pipeline writes to."""


class Piece(Protocol):
    """A piece of state that requests share."""

    @property
    def target(self) -> object: ...

    def open(self) -> None:
        """Write what was kept; remember the present state for :meth:`close`."""

    def close(self) -> bool:
        """Restore the state from before :meth:`open`, and keep what was written. Returns true if something was."""


@dataclass(frozen=True, slots=True)
class _Cast:
    """The tensor's own values in another dtype, or on another device if ``device`` names one."""

    dtype: torch.dtype
    device: torch.device | None

    def of(self, there: torch.Tensor) -> torch.Tensor:
        return there.to(there.device if self.device is None else self.device, self.dtype)


@dataclass(frozen=True, slots=True)
class _Values:
    """Values that replace the tensor's."""

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
    """The data of a parameter or buffer, by reference; the values of a small buffer, by copy."""

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
    """Every piece of state of ``module`` itself, without those of its sub-modules."""
    attributes = vars(module)
    yield Mapping(attributes)
    for value in attributes.values():
        if type(value) not in _STATELESS:
            yield from pieces_of_value(value)


def pieces_of_value(value: Any) -> Iterator[Piece]:
    """The state of a module's attribute: a tensor, an object such as a configuration, or a table or list of these."""
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
    """True for an object to which a pipeline could write attributes."""
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
    """Set or remove an entry, even of a frozen configuration."""
    kind: type[dict[Any, Any]] = OrderedDict if isinstance(target, OrderedDict) else dict
    if value is not _ABSENT:
        kind.__setitem__(target, name, value)
    elif name in target:
        kind.__delitem__(target, name)


def _same(one: object, other: object) -> bool:
    """True if writing ``other`` over ``one`` changes nothing."""
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
    """The value to keep when ``written`` replaced ``there``; for a cast of a tensor, the way to repeat it."""
    if not (type(there) is type(written) is torch.Tensor):
        return written
    if written.shape != there.shape or written.stride() != there.stride():
        return _Values(written)
    # an offloaded tensor is cast at rest on the host, and again on the device
    cast = _Cast(written.dtype, None if written.device == there.device else written.device)
    try:
        if not torch.equal(cast.of(there), written):
            return _Values(written)
    except RuntimeError:  # no memory for the cast, or no comparison of this dtype
        return _Values(written)
    return _UNCHANGED if (written.dtype, written.device) == (there.dtype, there.device) else cast
