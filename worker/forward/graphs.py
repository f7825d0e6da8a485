"""Graphs, as forwards see them. The package ``graphs`` implements them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from ...protocol.errors import Internal
from ...protocol.replicas import GraphStats
from .runner import Stage


class GraphMiss(Internal):
    """A block has no graph for a call, and graphs are enforced."""


class Graphs(Stage, Protocol):
    """A stage that replays what it has recorded of components."""

    def stats(self) -> GraphStats: ...

    def recording(self) -> AbstractContextManager[None]:
        """Within this context, every shape is recorded at once."""

    def enforce(self) -> None:
        """From now on, a block that runs eagerly raises ``GraphMiss``. Raises ``StartFailed`` if one did so before."""

    def revalidate(self) -> None:
        """Drop what is no longer valid, after an operation that may have moved weights."""

    def forget(self) -> None:
        """Free the memory of all recordings; the next forwards record them again."""
