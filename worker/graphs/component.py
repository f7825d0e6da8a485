"""The graphed blocks of one component, and for each of their calls the decision to replay, to record or to run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..forward.graphs import GraphMiss
from ..internals import transformers as transformers_internals
from ..internals.block_arguments import Arguments
from .arguments import RecordableArguments, read_arguments
from .block import Graphed, swap_in
from .library import ForwardPass, Library
from .purity import addresses, check_structure
from .recorded_call import RecordedCall
from .recorder import NotRecordable
from .shape import ShapeKey

Plain = Callable[..., Any]
"""A block's own forward."""


class GraphedComponent:
    """The ``blocks`` of the component ``name``. Outside a forward pass, they run eagerly."""

    def __init__(self, name: str, blocks: Mapping[str, nn.Module], library: Library) -> None:
        self._name = name
        self._blocks = blocks
        self._library = library
        self._pass: ForwardPass | None = None
        self._eager: str | None = None
        self._device = next(parameter.device for block in blocks.values() for parameter in block.parameters())
        self._addresses = self._read_addresses()
        self._reasons: dict[str, str] = {}  # by block, of the last eager run
        self._fit: set[str] = set()  # blocks whose structure was checked since the last operation
        for path, block in blocks.items():
            swap_in(path, block, self)

    @contextmanager
    def during(self, forward_pass: ForwardPass | None, reason: str | None = None) -> Iterator[None]:
        """Within this context, calls of blocks belong to ``forward_pass``.

        Without one, they run eagerly; with a ``reason`` for that, they are counted as misses.
        """
        before = self._pass, self._eager
        self._pass, self._eager = forward_pass, reason
        try:
            yield
        finally:
            self._pass, self._eager = before

    def revalidate(self) -> None:
        """Drop the recordings if weights lie elsewhere now. Blocks may have another structure, too."""
        self._fit.clear()
        now = self._read_addresses()
        if now != self._addresses:
            self._addresses = now
            self._library.forget(self._name)

    def eager_reasons(self) -> list[str]:
        """Why blocks ran eagerly though their shapes came again."""
        return [f"{self._name}, {number} blocks: {why}" for why, number in Counter(self._reasons.values()).items()]

    def call(self, block: Graphed, plain: Plain, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (forward_pass := self._pass) is None:
            if self._eager is not None:
                self._miss(block, self._eager)
            return plain(*args, **kwargs)
        try:
            self._check_structure(block)
            _check_collector()
            arguments = read_arguments(Arguments(args, kwargs), self._device)
        except NotRecordable as reason:
            self._miss(block, str(reason))
            return plain(*args, **kwargs)
        if (recorded := self._recorded(block, plain, arguments, forward_pass)) is None:
            return plain(*args, **kwargs)
        forward_pass.addresses |= recorded.addresses
        return recorded.replay()

    def _recorded(
        self, block: Graphed, plain: Plain, arguments: RecordableArguments, forward_pass: ForwardPass
    ) -> RecordedCall | None:
        """The recording to replay, whose static inputs hold ``arguments``; ``None`` if the block runs eagerly."""
        library, key = self._library, ShapeKey(self._name, arguments.signature, forward_pass.adapters)
        shape = library.enter(key, forward_pass)
        if shape is not None and (recorded := shape.recorded.get(block.name)) is not None:
            if recorded.is_held:
                self._miss(block, "what it returned before is still in use")
                return None
            shape.inputs.fill(arguments.tensors, forward_pass)
            library.counters.replays += 1
            return recorded
        if shape is not None and block.name in shape.refused:
            self._miss(block, shape.refused[block.name])
            return None
        if not library.may_record(key):
            library.counters.misses += 1
            if library.is_closed:
                raise GraphMiss(f"{self._described(block)}: {library.nearest(key, block, arguments, plain)}")
            return None
        with self.during(None):  # blocks within the block are part of its recording
            recorded = library.record(key, block, plain, arguments, forward_pass)
        if recorded is None:
            self._miss(block, library.reason(key, block))
        return recorded

    def _check_structure(self, block: Graphed) -> None:
        """Raises ``NotRecordable``."""
        if block.name not in self._fit:
            check_structure(block.module)
            self._fit.add(block.name)

    def _miss(self, block: Graphed, reason: str) -> None:
        """The block runs eagerly, and not because its shape is new."""
        self._library.counters.misses += 1
        self._reasons[block.name] = reason
        if self._library.is_closed:
            raise GraphMiss(f"{self._described(block)}: {reason}")

    def _described(self, block: Graphed) -> str:
        return (
            f"{block.name} of {self._name} has no CUDA graph for this call, and --enforce-piecewise-cuda-graph is set"
        )

    def _read_addresses(self) -> tuple[tuple[int, ...], ...]:
        return tuple(addresses(block) for block in self._blocks.values())


def _check_collector() -> None:
    """Raises ``NotRecordable`` while transformers collects more than what blocks return, by hooks within them."""
    if transformers_internals.collects_within_layers():
        raise NotRecordable("what its layers compute is collected by hooks")
