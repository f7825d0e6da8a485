"""The adapters that requests use, in LRU order: over their limit, replicas evict from the front."""

from __future__ import annotations

from collections.abc import Container, Iterable

from msgspec.structs import replace

from ..protocol.adapters import SetAdapters
from ..protocol.operations import Adapt
from .request import Request


class RecentAdapters:
    """Owns the order. ``requests`` are those that are not answered yet, whose adapters are busy."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._requests = requests
        self._recent: dict[str, None] = {}

    def used(self, nicknames: Iterable[str], loaded: Container[str]) -> None:
        for name in nicknames:
            if name in loaded:
                self._recent.pop(name, None)
                self._recent[name] = None

    def annotated(self, operation: Adapt, loaded: Container[str]) -> Adapt:
        """``operation``, with what replicas need to know to evict adapters."""
        if not isinstance(operation.change, SetAdapters):
            return operation
        self._recent = {name: None for name in self._recent if name in loaded}
        busy = {use.name for request in self._requests for use in request.generate.lora or ()}
        return replace(operation, change=replace(operation.change, recent=list(self._recent), busy=sorted(busy)))
