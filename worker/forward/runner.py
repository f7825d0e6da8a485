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


@dataclass(slots=True)
class Counters:
    """Component calls answered since the start, the forwards run for them, and those whose rows ranks shared."""

    calls: int = 0
    forwards: int = 0
    divided: int = 0


class Division(Protocol):
    """Divides forwards among ranks."""

    name: str

    def answers(self, forward: Forward, run: Callable[[Forward], list[Any]], counters: Counters) -> list[Any]:
        """The answers of the forward's calls; ``run`` computes a forward, or a part of it, on this rank."""


class Runner:
    """Runs forwards through ``stages``, the first one outermost; a ``division`` shares their rows among ranks."""

    def __init__(self, stages: Sequence[Stage], division: Division | None = None) -> None:
        self.stages = stages
        self.counters = Counters()
        self._division = division
        self._row_parts = RowParts()

    @property
    def names(self) -> list[str]:
        """The names of what forwards pass, in its order."""
        return [*([] if self._division is None else [self._division.name]), *(stage.name for stage in self.stages)]

    def answers(self, forward: Forward) -> list[Any]:
        """Run ``forward`` and return one answer per call. Raises any exception of the component, a stage or collate."""
        if self._division is None:
            return self._enter(0, forward)
        return self._division.answers(forward, lambda part: self._enter(0, part), self.counters)

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
