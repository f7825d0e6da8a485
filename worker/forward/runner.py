"""The runner: the one place where a component is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .batch import Forward
from .collate import RowParts, collate


class Stage(Protocol):
    """A wrapper around a component's call.

    It returns the answers of the forward's calls, in their order: those of ``proceed()``, which runs the forward, or
    its own. Stages must be reentrant: a merged forward may run a probe.
    """

    name: str
    """Shown by ``/server_info``."""

    def __call__(self, forward: Forward, proceed: Callable[[], list[Any]]) -> list[Any]: ...


class Division(Protocol):
    """Divides forwards among ranks."""

    name: str
    forwards: int

    def answers(self, forward: Forward, run: Callable[[Forward], list[Any]]) -> list[Any]:
        """The answers of the forward's calls; ``run`` computes a forward, or a part of it, on this rank."""


@dataclass(slots=True)
class Counters:
    """Component calls answered since the start, and the forwards run for them."""

    calls: int = 0
    forwards: int = 0


class Runner:
    """Runs forwards through ``stages``, the first one outermost; a ``division`` shares their rows among ranks."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = stages
        self.division: Division | None = None
        self.counters = Counters()
        self._row_parts = RowParts()

    @property
    def names(self) -> list[str]:
        """The names of what forwards pass, in its order."""
        return [*([] if self.division is None else [self.division.name]), *(stage.name for stage in self.stages)]

    def answers(self, forward: Forward) -> list[Any]:
        """Run ``forward`` and return one answer per call. Raises any exception of the component, a stage or collate."""
        if self.division is None:
            return self._enter(0, forward)
        return self.division.answers(forward, lambda part: self._enter(0, part))

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
