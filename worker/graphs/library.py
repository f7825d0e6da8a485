"""The recordings of all components, within a budget of memory: the shapes used least recently go first."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..internals.block_arguments import Signature
from .arguments import RecordableArguments, difference
from .block import Graphed
from .purity import Purity, weights
from .recorded_call import RecordedCall
from .recorder import NotRecordable, Recorder
from .shape import Shape, ShapeKey, Sightings
from .static_inputs import StaticInputs

log = logging.getLogger(__name__)

NO_MEMORY = "the graphs of its shape need more memory than there is, or than --cuda-graph-mb"

_NEAREST = 3
"""Differences that an error names."""


@dataclass(slots=True)
class Counters:
    """Calls of blocks that were recorded, replayed, and run eagerly; shapes dropped for lack of memory."""

    captures: int = 0
    replays: int = 0
    misses: int = 0
    evictions: int = 0


@dataclass(slots=True, eq=False)
class ForwardPass:
    """One forward of a component. ``addresses`` are those of the memory that replays wrote their outputs to."""

    adapters: Hashable
    used: set[ShapeKey] = field(default_factory=set)
    addresses: set[int] = field(default_factory=set)


class Library:
    """Records calls with ``recorder``, in at most ``max_bytes``.

    A shape is recorded once it was seen in ``record_after`` forwards; while :attr:`records_all`, at once.
    """

    def __init__(self, recorder: Recorder, max_bytes: int, record_after: int) -> None:
        self.counters = Counters()
        self.records_all = False
        self.is_closed = False
        """While true, only shapes that were recorded before are recorded again."""
        self._recorder = recorder
        self._max_bytes = max_bytes
        self._shapes: OrderedDict[ShapeKey, Shape] = OrderedDict()
        self._sightings = Sightings(record_after)
        self._known: set[tuple[str, Signature]] = set()
        self._too_large: set[ShapeKey] = set()  # with the others of one forward; tried again after an operation

    @property
    def nbytes(self) -> int:
        return sum(shape.nbytes for shape in self._shapes.values())

    def __len__(self) -> int:
        return len(self._shapes)

    def enter(self, key: ShapeKey, forward_pass: ForwardPass) -> Shape | None:
        """The recordings for ``key``, which is now the one used last."""
        if key not in forward_pass.used:
            forward_pass.used.add(key)
            self._sightings.see(key)
            if key in self._shapes:
                self._shapes.move_to_end(key)
        return self._shapes.get(key)

    def may_record(self, key: ShapeKey) -> bool:
        if key in self._too_large:
            return False
        if self.records_all:
            return True
        if self.is_closed:
            return (key.component, key.signature) in self._known
        return self._sightings.suffice(key)

    def record(
        self,
        key: ShapeKey,
        block: Graphed,
        plain: Callable[..., Any],
        arguments: RecordableArguments,
        forward_pass: ForwardPass,
    ) -> RecordedCall | None:
        """Record a call of ``block``; ``None`` if that cannot be, or if there is no memory. The shape says why."""
        shape = self._shapes.get(key)
        try:
            if shape is None:
                shape = Shape(key, StaticInputs(arguments.tensors), self._recorder.new_pool())
                self._shapes[key] = shape
            shape.inputs.fill(arguments.tensors, forward_pass)
            recorded = _recorded(shape, block, plain, arguments)
        except NotRecordable as reason:
            assert shape is not None, "a shape refuses blocks"
            shape.refused[block.name] = str(reason)
            log.info("%s of %s runs eagerly: %s", block.name, key.component, reason)
            return None
        except torch.OutOfMemoryError:
            log.warning("graphs make way: the device has no memory to record %s of %s", block.name, key.component)
            self.drop_all()
            return None
        shape.recorded[block.name] = recorded
        self.counters.captures += 1
        self._known.add((key.component, key.signature))
        self._evict(key, forward_pass)
        return recorded if key in self._shapes else None

    def reason(self, key: ShapeKey, block: Graphed) -> str:
        """Why ``block`` could not be recorded just now."""
        shape = self._shapes.get(key)
        return NO_MEMORY if shape is None else shape.refused[block.name]

    def drop_all(self) -> bool:
        """Drop everything for lack of memory. Returns true if there was something."""
        keys = [*self._shapes]
        for key in keys:
            self._drop(key)
        return bool(keys)

    def forget(self, component: str | None = None) -> None:
        """Drop what was recorded of ``component``, or of all; the next forwards record it again."""
        self._too_large.clear()
        for key in [key for key in self._shapes if component in (None, key.component)]:
            del self._shapes[key]

    def nearest(self, key: ShapeKey, block: Graphed, arguments: RecordableArguments, plain: Callable[..., Any]) -> str:
        """How the call of ``block`` differs from the most similar one that was recorded, in words."""
        names = arguments.arguments.names(plain)
        shapes = [shape for shape in self._shapes.values() if block.name in shape.recorded]
        found = [
            difference(key.signature, shape.key.signature, names)
            for shape in shapes
            if shape.key.component == key.component
        ]
        if not found:
            return "nothing was captured of it"
        nearest = min(found, key=len)
        return "; ".join(nearest[:_NEAREST]) or "it has the arguments of a captured call, with other adapters"

    def _evict(self, key: ShapeKey, forward_pass: ForwardPass) -> None:
        while self.nbytes > self._max_bytes:
            others = [other for other in self._shapes if other not in forward_pass.used]
            self._drop(others[0] if others else key)
            if not others:
                self._too_large.add(key)
                return

    def _drop(self, key: ShapeKey) -> None:
        del self._shapes[key]
        self._sightings.forget(key)
        self.counters.evictions += 1


def _recorded(shape: Shape, block: Graphed, plain: Callable[..., Any], arguments: RecordableArguments) -> RecordedCall:
    """Record the call with the static inputs, after a call that shows that it leaves everything else as it is."""
    static = arguments.with_tensors(shape.inputs.buffers)
    with Purity(block.module, shape.inputs.buffers) as purity:
        plain(*static.args, **static.kwargs)
        purity.check()
    foreign = [*shape.inputs.buffers, *weights(block.module)]
    return RecordedCall(shape.pool, lambda: plain(*static.args, **static.kwargs), foreign)
