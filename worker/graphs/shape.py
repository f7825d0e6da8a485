"""The recordings for one shape: calls of blocks with equal signatures, which share static inputs and a pool."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from ..internals.block_arguments import Signature
from .recorded_call import RecordedCall
from .recorder import Pool
from .static_inputs import StaticInputs


class ShapeKey(NamedTuple):
    """``adapters`` stands for the memory that adapted layers read, and its shapes."""

    component: str
    signature: Signature
    adapters: Hashable


@dataclass(slots=True, eq=False)
class Shape:
    """``refused`` says of blocks why they cannot be recorded."""

    key: ShapeKey
    inputs: StaticInputs
    pool: Pool
    recorded: dict[str, RecordedCall] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return self.inputs.nbytes + sum(one.nbytes for one in self.recorded.values())


_REMEMBERED = 512
"""Shapes whose sightings are counted."""

_MOST_DOUBLED = 10
"""A shape that was dropped so often needs no more sightings than after this many times."""


class Sightings:
    """Counts the forwards in which each shape was seen, to record only those that come again.

    A recording costs as much as a few forwards. A shape that was dropped for lack of memory must be seen twice as often
    as before, so that shapes that do not fit together stop replacing each other.
    """

    def __init__(self, needed: int) -> None:
        self._needed = needed
        self._seen: OrderedDict[ShapeKey, int] = OrderedDict()
        self._dropped: OrderedDict[ShapeKey, int] = OrderedDict()

    def see(self, key: ShapeKey) -> None:
        self._seen[key] = self._seen.pop(key, 0) + 1
        while len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)

    def suffice(self, key: ShapeKey) -> bool:
        return self._seen.get(key, 0) >= self._needed << min(self._dropped.get(key, 0), _MOST_DOUBLED)

    def forget(self, key: ShapeKey) -> None:
        """The shape was dropped for lack of memory."""
        self._seen.pop(key, None)
        self._dropped[key] = self._dropped.pop(key, 0) + 1
        while len(self._dropped) > _REMEMBERED:
            self._dropped.popitem(last=False)
