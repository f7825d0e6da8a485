"""Compiled components, as forwards see them. The package ``compiling`` implements them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from ...protocol.compiling import CompiledComponentStats


class Compiled(Protocol):
    """The components of a rank that are compiled."""

    def active(self, component: str) -> AbstractContextManager[None]:
        """Within this context, ``component`` runs what was compiled of it."""

    def stats(self) -> Mapping[str, CompiledComponentStats]:
        """Counts by component."""

    def wait(self) -> None:
        """Return when nothing is left to compile."""

    def close(self) -> None:
        """Compile nothing further."""
