"""A compilable block: it runs its class's own forward, or what its component has compiled."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from ..crossing.overlay import Overlay, overlay_attributes

COMPILED = "compiled"
"""The one attribute that a compilable block has and its base has not."""


Plain = Callable[..., Any]
"""A block's own forward, with the block as its first argument."""


class Runs(Protocol):
    """Runs a block's call in one way or another."""

    def call(self, block: nn.Module, plain: Plain, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


class CompilableBlock(Overlay):
    """Stands before a block's class. The block's own hooks run around it, in each call."""

    overlay_attribute = COMPILED
    compiled: Runs


@functools.cache
def compilable_class(base: type[nn.Module]) -> type[CompilableBlock]:
    """The class of compilable blocks whose own class is ``base``; it has the same name, which libraries look at."""

    @functools.wraps(base.forward)
    def forward(self: CompilableBlock, *args: Any, **kwargs: Any) -> Any:
        return self.compiled.call(self, base.forward, args, kwargs)

    return type(base.__name__, (CompilableBlock, base), {"forward": forward, "__module__": __name__})


def swap_in(block: nn.Module, runs: Runs) -> None:
    vars(block)[COMPILED] = runs
    block.__class__ = compilable_class(type(block))  # type: ignore[arg-type]  # a class is hashable


def copied(block: nn.Module, *values: Any) -> tuple[Any, ...]:
    """A copy of ``block`` with weights and adapters of its own, and of ``values``; the runtime's parts stay shared."""
    shared = {id(part): part for part in (vars(block)[name] for name in overlay_attributes(block))}
    found: tuple[Any, ...] = copy.deepcopy((block, *values), shared)
    return found
