"""The boundary: what stands in a pipeline's fork where the component stood.

It looks like the component in every way that a pipeline can ask for (class, attributes, configuration), and turns
each call that carries tensors into a :class:`Call` for the hub.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .call import Call, cross

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)

Crossing = Callable[[Call], Any]


class Boundary:
    """Stands for ``module`` under the dotted name ``path``; ``crossing`` is what happens to its calls.

    Reading an attribute reads the module's, with sub-modules behind boundaries of their own. Writing one writes to the
    shared module, as the pipeline's author meant it; the self-test finds pipelines that this makes unfit to share.
    """

    __slots__ = ("_crossing", "_module", "_path")

    def __init__(self, module: nn.Module, path: str, crossing: Crossing = cross) -> None:
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "_crossing", crossing)

    @property  # type: ignore[misc]  # isinstance() asks for __class__, which a property may answer
    def __class__(self) -> type:
        return type(self._module)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, nn.Module) and not isinstance(value, _CONTAINERS):
            return Boundary(value, f"{self._path}.{name}", self._crossing)
        if inspect.ismethod(value) and value.__self__ is self._module:
            method = partial(self._call_method, name, value)
            vars(method)["__wrapped__"] = value  # some pipelines look at a method's signature
            return method
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._crossing(Call(self._path, "__call__", self._module, args, kwargs))

    def __repr__(self) -> str:
        return f"Boundary({self._path}: {type(self._module).__name__})"

    def _call_method(self, name: str, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
            return method(*args, **kwargs)
        return self._crossing(Call(self._path, name, method, args, kwargs))
