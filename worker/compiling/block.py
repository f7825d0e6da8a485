"""A compilable block: it runs its class's own forward, or what its component has compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from ..crossing.overlay import Overlay, overlay_attributes, put_overlay
from ..internals.transformers import remove_collecting_hooks
from ..parallel.sequence import exchange_of

Plain = Callable[..., Any]
"""A block's own forward."""


class Runs(Protocol):
    """Runs a block's call in one way or another."""

    def call(self, block: nn.Module, plain: Plain, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


class CompilableBlock(Overlay):
    """Stands before a block's class. The block's own hooks run around it, in each call."""

    overlay_attribute = "compiled"
    compiled: Runs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compiled.call(self, super().forward, args, kwargs)


def swap_in(block: nn.Module, runs: Runs) -> None:
    put_overlay(CompilableBlock, block, runs)


def copied(block: nn.Module, *values: Any) -> tuple[Any, ...]:
    """A copy of ``block`` with weights and adapters of its own, and of ``values``; the runtime's parts stay shared."""
    shared = {id(part): part for part in (vars(block)[name] for name in overlay_attributes(block))}
    if (exchange := exchange_of(block)) is not None:
        shared[id(exchange._ulysses_mesh)] = exchange._ulysses_mesh
    found: tuple[Any, ...] = copy.deepcopy((block, *values), shared)
    remove_collecting_hooks(found[0])  # dynamo traces hooks, and graphs serve blocks with and without them
    return found
