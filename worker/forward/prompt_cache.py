"""The prompt cache: text encoder outputs by exact input, so that a repeated prompt is encoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from ..crossing.answers import cloned, tensors_of
from ..crossing.call import Call
from ..crossing.coroutine import Coroutine
from .adapters import ActiveAdapters
from .batch import Forward, Pending
from .signature import digest
from .structure import flatten


@dataclass(slots=True)
class _Entry:
    value: Any
    size: int
    exact: bool


class PromptCache:
    """An LRU cache of the outputs of components named ``text_encoder…``, at most ``capacity`` bytes.

    An entry is *exact* if its forward was not merged: it is bitwise what the component returns for this input. If
    ``compiled``, that holds for the forwards of plain requests alone. A lookup with ``exact`` ignores other entries.
    Values are cloned on the way in and out, because pipelines may write to them.
    """

    def __init__(self, capacity: int, *, compiled: bool = False) -> None:
        self._capacity = capacity
        self._compiled = compiled
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._size = 0

    def needs_exact(self, coroutine: Coroutine) -> bool:
        """True if ``coroutine`` may only have what the component computes for it alone."""
        return coroutine.plain if self._compiled else coroutine.alone

    def is_exact(self, forward: Forward) -> bool:
        """True if the answers of ``forward`` are exact."""
        return not forward.merged and (forward.calls[0].coroutine.plain or not self._compiled)

    def holds(self, key: Hashable, *, exact: bool) -> bool:
        """True if :meth:`get` would return a value."""
        entry = self._entries.get(key)
        return entry is not None and (entry.exact or not exact)

    def get(self, key: Hashable, *, exact: bool) -> Any | None:
        """The output cached under ``key`` (made by :func:`prompt_key`), or ``None``."""
        if not self.holds(key, exact=exact):
            return None
        self._entries.move_to_end(key)
        return cloned(self._entries[key].value)

    def put(self, key: Hashable, value: Any, *, exact: bool) -> None:
        """Cache ``value``, unless it has leaves other than tensors, exceeds the capacity, or an exact entry exists."""
        tensors = tensors_of(value)
        if key is None or tensors is None:
            return
        size = sum(tensor.nbytes for tensor in tensors)
        known = self._entries.get(key)
        if size > self._capacity or (known is not None and known.exact):
            return
        self._drop(key)
        self._entries[key] = _Entry(cloned(value), size, exact)
        self._size += size
        while self._size > self._capacity:
            self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        """Drop all entries; required whenever a text encoder's weights change."""
        self._entries.clear()
        self._size = 0

    def _drop(self, key: Hashable) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._size -= entry.size


def is_text_encoder(component: str) -> bool:
    """True for a component, or a part of one, whose outputs are kept."""
    return component.startswith("text_encoder")


def prompt_key(call: Call) -> Hashable | None:
    """The cache key of a call: the text encoder's name and its arguments' contents; ``None`` if it is not cacheable."""
    if not is_text_encoder(call.component) or call.method not in ("__call__", "forward"):
        return None
    leaves, structure = flatten(call)
    marks: list[Hashable] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            marks.append((tuple(leaf.shape), leaf.dtype, leaf.device, digest(leaf)))
        elif isinstance(leaf, str | int | float | bool | None):
            marks.append((type(leaf), leaf))
        else:
            return None
    return (call.name, structure, tuple(marks))


def prompt_of(pending: Pending, uses: ActiveAdapters) -> Hashable | None:
    """The cache key of a pending call: its :func:`prompt_key`, adapters and torch settings."""
    if pending.prompt is None:
        return None
    return pending.prompt, tuple((adapter.number, strength) for adapter, strength in uses), pending.state
