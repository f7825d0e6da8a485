"""The boundary: a proxy that takes a component's place in a pipeline's fork.

It looks like the component in every way that a pipeline can ask for (class, attributes, configuration), and turns
each call with tensors into a :class:`Call` for the batcher. Everything that can write to the component passes through
it, so that the fork's changes stay in the fork (:class:`Changes`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, ItemsView, Iterable, Iterator, ValuesView
from functools import partial
from types import GeneratorType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..pipelines.components import MERGEABLE_METHODS
from .call import Call, cross
from .changes import Changes
from .facts import OF_MODULES
from .overlay import base_class

Crossing = Callable[[Call], Any]

_READS = frozenset(
    {
        *("parameters", "named_parameters", "buffers", "named_buffers", "state_dict", "get_parameter", "get_buffer"),
        *("modules", "named_modules", "children", "named_children", "get_submodule", "keys", "values", "items"),
        *("get_input_embeddings", "get_output_embeddings", "num_parameters"),
        *("cache_context", "_reset_stateful_cache"),  # of a step cache's hooks, set up by other code
    }
)
"""Methods that write nothing when called without tensors. Any other may write, and is watched."""

_PLAIN = frozenset({torch.dtype, torch.device, str, int, float, bool, tuple, type(None)})


class Boundary:
    """A proxy of ``module``, whose calls go to ``crossing`` under the dotted name ``path``.

    Reading an attribute reads the module's; modules among the attributes get boundaries too. ``component`` is the
    pipeline's component that the module belongs to. ``path`` is a function where it takes a search, called only when
    the module is: pipelines iterate over all modules of a component and call few.
    """

    __slots__ = ("_changes", "_component", "_crossing", "_module", "_path")

    def __init__(
        self,
        module: nn.Module,
        path: str | Callable[[], str],
        crossing: Crossing = cross,
        changes: Changes | None = None,
        component: nn.Module | None = None,
    ) -> None:
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "_crossing", crossing)
        object.__setattr__(self, "_changes", Changes() if changes is None else changes)
        object.__setattr__(self, "_component", module if component is None else component)

    @property  # type: ignore[misc]  # isinstance() asks for __class__, which a property may answer
    def __class__(self) -> type:
        return base_class(self._module)

    def __getattr__(self, name: str) -> Any:
        if name in OF_MODULES:
            value = self._changes.fact(self._module, self._component, name)
        else:
            value = getattr(self._module, name)
        if type(value) in _PLAIN:  # not isinstance, which runs Python code for torch's types
            return value
        if isinstance(value, nn.Module):
            return self._behind(value, name)
        if inspect.ismethod(value) and value.__self__ is self._module:
            method = partial(self._call_method, name, value)
            vars(method)["__wrapped__"] = value  # some pipelines look at a method's signature
            return method
        self._changes.watch_value(value, self._component)
        if isinstance(value, dict | list) and any(isinstance(part, nn.Module) for part in _elements(value)):
            self._changes.watch(self._module, self._component, below=True)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        self._may_write(name)
        setattr(self._module, name, _without_boundaries(value))

    def __delattr__(self, name: str) -> None:
        self._may_write(name)
        delattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._cross("__call__", self._module, args, kwargs)

    def __bool__(self) -> bool:
        return bool(self._module)

    def __len__(self) -> int:
        return len(self._module)

    def __iter__(self) -> Iterator[Any]:
        return (self._wrapped(part) for part in self._module)

    def __contains__(self, part: object) -> bool:
        return _without_boundaries(part) in self._module

    def __getitem__(self, index: Any) -> Any:
        return self._wrapped(self._module[index])

    def __setitem__(self, index: Any, part: Any) -> None:
        self._changes.watch(self._module, self._component, below=True)
        self._module[index] = _without_boundaries(part)

    def __delitem__(self, index: Any) -> None:
        self._changes.watch(self._module, self._component, below=True)
        del self._module[index]

    def __eq__(self, other: object) -> bool:
        return self._module is _without_boundaries(other)

    def __hash__(self) -> int:
        return hash(self._module)

    def __repr__(self) -> str:
        return f"Boundary({self._dotted()}: {type(self._module).__name__})"

    def _call_method(self, name: str, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
            return self._cross(name, method, args, kwargs)
        if name not in _READS:
            self._changes.watch(self._module, self._component, below=True)
        args, kwargs = _without_boundaries((args, kwargs))
        return self._wrapped(method(*args, **kwargs))

    def _cross(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        call = Call(self._dotted(), name, function, args, kwargs)
        writes = None if name in MERGEABLE_METHODS else self._module
        return self._changes.cross(call, self._crossing, self._component, writes)

    def _may_write(self, name: str) -> None:
        """Watch the module, or all modules below it for a property, whose setter may write anywhere."""
        below = hasattr(type(self._module), name)
        self._changes.watch(self._module, self._component, below=below)

    def _dotted(self) -> str:
        path: str | Callable[[], str] = self._path
        return path if isinstance(path, str) else path()

    def _behind(self, module: nn.Module, name: str | None = None) -> Boundary:
        path = partial(self._path_of, module) if name is None else f"{self._dotted()}.{name}"
        return Boundary(module, path, self._crossing, self._changes, self._component)

    def _wrapped(self, value: Any) -> Any:
        """A method's return value, with boundaries in place of modules; weights in it are watched."""
        if isinstance(value, torch.Tensor):
            self._changes.watch_value(value, self._component)
            return value
        if isinstance(value, nn.Module):
            return self if value is self._module else self._behind(value)
        if isinstance(value, GeneratorType | ValuesView | ItemsView):
            return (self._wrapped(element) for element in value)
        if type(value) in (tuple, list):
            return type(value)(self._wrapped(element) for element in value)
        if type(value) is dict:
            return {name: self._wrapped(element) for name, element in value.items()}
        return value

    def _path_of(self, module: nn.Module) -> str:
        found = next((name for name, part in self._module.named_modules() if part is module), None)
        return f"{self._dotted()}.{type(module).__name__ if found is None else found}"


def found_of(boundary: Boundary, find: Callable[[nn.Module], Any]) -> Any | None:
    """``find(module)``, called once for all requests; ``None`` where this one may have changed the component."""
    return boundary._changes.found(boundary._module, boundary._component, find)


def _elements(value: dict[Any, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _without_boundaries(value: Any) -> Any:
    """``value`` with modules in place of their boundaries."""
    if type(value) is Boundary:
        return value._module
    if type(value) in (tuple, list):
        return type(value)(_without_boundaries(element) for element in value)
    if type(value) is dict:
        return {name: _without_boundaries(element) for name, element in value.items()}
    return value
