"""Tiles of autoencoders: a picture or clip that does not fit into memory is decoded in overlapping tiles.

Tiles differ from the whole where they overlap (diffusers blends them), so a call is tiled only where the operator asks
for it, or where the whole has run out of memory with the device to itself. Deterministic requests are never tiled.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from ..crossing.call import Call
from .batch import Forward
from .policy import FORWARDS_TO_RECOVER

log = logging.getLogger(__name__)

Tiles = Literal["auto", "on", "off"]


class Tiling:
    """Tiles calls of ``components`` that can be tiled: all, none, or with ``auto`` those that ran out of memory whole.

    ``slices`` has autoencoders compute the rows of a shared forward one after the other.
    """

    name = "tiles of autoencoders"

    def __init__(self, components: Mapping[str, nn.Module], tiles: Tiles = "auto", *, slices: bool = False) -> None:
        self.tiled_calls = 0
        self._components = components
        self._tiles = tiles
        self._slices = slices
        self._too_large: dict[str, int] = {}  # elements of the smallest call that ran out of memory, by name
        self._tiled_since: dict[str, int] = {}

    def __call__(self, forward: Forward, proceed: Callable[[], list[Any]]) -> list[Any]:
        component = self._components.get(forward.component)
        if component is None or _is_plain(forward):
            return proceed()
        tiled = self._is_tiled(forward)
        with _switched(component, "use_tiling", on=tiled), _switched(component, "use_slicing", on=self._slices):
            answers = proceed()
        if tiled and not forward.probe:
            self.tiled_calls += len(forward.calls)
            self._retry_later(forward.name)
        return answers

    def learn(self, forward: Forward) -> bool:
        """Record that a call ran out of memory alone. Returns true if it is to run again, in tiles."""
        if self._tiles != "auto" or not self._can_tile(forward) or self._is_tiled(forward):
            return False
        log.warning("%s ran out of memory; calls of its size are computed in tiles", forward.name)
        self._too_large[forward.name] = _size(forward.calls[0].call)
        self._tiled_since[forward.name] = 0
        return True

    def _is_tiled(self, forward: Forward) -> bool:
        if not self._can_tile(forward):
            return False
        smallest = self._too_large.get(forward.name)
        return self._tiles == "on" or (smallest is not None and _size(forward.calls[0].call) >= smallest)

    def _can_tile(self, forward: Forward) -> bool:
        component = self._components.get(forward.component)
        return self._tiles != "off" and not _is_plain(forward) and hasattr(component, "use_tiling")

    def _retry_later(self, name: str) -> None:
        """Try the whole again after some tiled forwards, as the memory may be back."""
        if name in self._too_large:
            self._tiled_since[name] += 1
            if self._tiled_since[name] == FORWARDS_TO_RECOVER:
                del self._too_large[name], self._tiled_since[name]


def _is_plain(forward: Forward) -> bool:
    return any(pending.coroutine.plain for pending in forward.calls)


@contextlib.contextmanager
def _switched(component: Any, name: str, *, on: bool) -> Iterator[None]:
    """Within this context, the switch ``name`` is on if ``on`` is set and the component has it."""
    if not on or not hasattr(component, name):
        yield
        return
    before = getattr(component, name)
    setattr(component, name, True)
    try:
        yield
    finally:
        setattr(component, name, before)


def _size(call: Call) -> int:
    """Elements of the call's largest tensor."""
    tensors = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, torch.Tensor)]
    return max((tensor.numel() for tensor in tensors), default=0)
