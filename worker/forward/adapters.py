"""Adapters, as forwards see them: which a call has, and what applies them. The package ``lora`` implements them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol


class Adapter(Protocol):
    """A loaded adapter."""

    @property
    def number(self) -> int:
        """A serial number, which no other adapter gets later."""


ActiveAdapters = tuple[tuple[Adapter, float], ...]
"""The adapters of a call, each with its strength."""


class CannotMix(Exception):
    """Rows cannot have different adapters: a layer's input is not in rows, or their factors are too large together."""


class Adapters(Protocol):
    """The adapters of a rank. ``Any`` stands for what only the implementation looks into."""

    def uses(self, component: str, requested: Any) -> ActiveAdapters:
        """The adapters of a call to ``component`` in a request that named ``requested``."""

    def applied(self, component: str, rows: Sequence[tuple[int, Any]], *, listed: bool) -> AbstractContextManager[None]:
        """Apply, within the context, adapters to the rows of a forward of ``component``. Raises ``CannotMix`` in it.

        ``rows`` are numbers of rows, each with their :data:`ActiveAdapters`.
        """

    def memory(self, component: str) -> Hashable:
        """The memory that a forward of ``component`` reads for adapters within :meth:`applied`, and its shapes."""

    def forget_gathered(self) -> None:
        """Release the memory that forwards need for adapters; the next one allocates it again."""
