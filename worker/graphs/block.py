"""A graphed block: its class's own forward, or a replay of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from ..crossing.overlay import Overlay, put_overlay


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

    overlay_attribute = "graphed"
    graphed: Graphed

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.graphed.replays.call(self.graphed, super().forward, args, kwargs)


def swap_in(name: str, block: nn.Module, replays: Replays) -> None:
    put_overlay(GraphedBlock, block, Graphed(name, block, replays))
