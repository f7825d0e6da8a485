"""A graphed block: its class's own forward, or a replay of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from ..crossing.overlay import Overlay

GRAPHED = "graphed"
"""The one attribute that a graphed block has and its base has not."""


class Replays(Protocol):
    """Decides for each call of a block whether it is replayed."""

    def call(self, block: Graphed, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


@dataclass(frozen=True, slots=True, eq=False)
class Graphed:
    """The block ``name`` of a component."""

    name: str
    module: nn.Module
    replays: Replays


class GraphedBlock(Overlay):
    """Stands before a block's class. The block's own hooks run around it, in each call."""

    overlay_attribute = GRAPHED
    graphed: Graphed


@functools.cache
def graphed_class(base: type[nn.Module]) -> type[GraphedBlock]:
    """The class of graphed blocks whose own class is ``base``; it has the same name, which libraries look at."""

    @functools.wraps(base.forward)
    def forward(self: GraphedBlock, *args: Any, **kwargs: Any) -> Any:
        graphed = self.graphed
        return graphed.replays.call(graphed, functools.partial(base.forward, self), args, kwargs)

    return type(base.__name__, (GraphedBlock, base), {"forward": forward, "__module__": __name__})


def swap_in(name: str, block: nn.Module, replays: Replays) -> None:
    vars(block)[GRAPHED] = Graphed(name, block, replays)
    block.__class__ = graphed_class(type(block))  # type: ignore[arg-type]  # a class is hashable
