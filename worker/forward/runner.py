"""The one place where a component is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .batch import Forward
from .collate import RowParts, collate


class Stage(Protocol):
    """Something that stands around a component's call.

    It returns the answers of the forward's calls, in their order: those of ``proceed()``, which makes the forward, or
    its own. Stages may stand within each other, as a merged forward may need a probe.
    """

    name: str
    """As ``/server_info`` shows it."""

    def __call__(self, forward: Forward, proceed: Callable[[], list[Any]]) -> list[Any]: ...


@dataclass(slots=True)
class Counters:
    """Since the start: component calls answered, and forwards that it took."""

    calls: int = 0
    forwards: int = 0


class Runner:
    """Makes forwards, through ``stages`` from the first to the last."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = stages
        self.counters = Counters()
        self._row_parts = RowParts()

    def answers(self, forward: Forward) -> list[Any]:
        """What each of the forward's calls returns. Raises what the component, a stage or the collation raises."""
        return self._enter(0, forward)

    def _enter(self, depth: int, forward: Forward) -> list[Any]:
        if depth == len(self.stages):
            return self._call(forward)
        return self.stages[depth](forward, lambda: self._enter(depth + 1, forward))

    def _call(self, forward: Forward) -> list[Any]:
        first = forward.calls[0].call
        self.counters.forwards += 1
        if not forward.merged and not forward.probe:
            return [first.run()]
        parts = forward.parts
        args, kwargs = collate(parts)
        output = first.function(*args, **kwargs)
        if forward.probe:
            return [output]
        return self._row_parts.uncollate(output, parts, lambda: self.answers(forward.probe_of_first())[0])
