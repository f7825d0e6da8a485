"""A component whose blocks are compiled: which of their calls run a graph, which run eagerly, and why."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ...protocol.compiling import CompiledComponentStats, State
from ..internals.block_arguments import Arguments
from ..internals.blocks import library_class, repeated_blocks
from ..internals.transformers import collects_within_layers
from ..lora.layers import AdaptedLayer, is_adaptable
from ..parallel.sequence import exchange_of
from .arguments import contiguous, signature_of
from .block import Plain, copied, swap_in
from .program import DoesNotFit, Graph, Program

log = logging.getLogger(__name__)

ATTEMPTS = 4
"""How often a key is compiled: adapters of other layers, or a request's settings of torch, need a further graph."""

Key = Hashable

Ticket = tuple[str, type[nn.Module], Key]
"""The component, the class of blocks, and the kind of call that a job is for."""


class Queue(Protocol):
    """Takes jobs for the compiler."""

    def program(self, cls: type[nn.Module]) -> Program:
        """The program of the blocks of class ``cls``, which all components share."""

    def offer(self, ticket: Ticket, make: Callable[[], Job]) -> None:
        """Queue ``make()`` unless a job with this ticket waits, or too many do. If it raises, refuse the component."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A call of a block to be compiled for ``component`` under ``key``; ``block`` and ``arguments`` are copies."""

    component: CompiledComponent
    program: Program
    key: Key
    block: nn.Module
    arguments: Arguments

    @property
    def ticket(self) -> Ticket:
        return (self.component.name, self.program.cls, self.key)


class CompiledComponent:
    """The blocks of the component ``name``. Until :meth:`active` they run eagerly, and nothing is compiled.

    A call runs a graph that was admitted for calls with its key. Without one it runs eagerly, and the compiler gets a
    copy of it. Raises ``NoBlocks``.
    """

    def __init__(self, name: str, module: nn.Module, queue: Queue) -> None:
        self.name = name
        self.seconds = 0.0
        self.reason: str | None = None
        """Why the component runs eagerly for good; ``None`` if it does not."""
        self._queue = queue
        self._active = False
        self._admitted: dict[tuple[type[nn.Module], Key], tuple[Graph, ...]] = {}
        self._attempts: Counter[tuple[type[nn.Module], Key]] = Counter()
        self._over_limit: set[tuple[type[nn.Module], Key]] = set()
        self._calls = self._eager = 0
        self._exchange = exchange_of(module)
        self._warned = False
        groups = repeated_blocks(module)
        self._programs = {group.cls: queue.program(group.cls) for group in groups}
        for group in groups:
            for block in group.modules.values():
                swap_in(block, self)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within this context, blocks run their graphs."""
        before, self._active = self._active, True
        try:
            yield
        finally:
            self._active = before

    def admit(self, cls: type[nn.Module], key: Key, graph: Graph) -> None:
        """From now on, calls of blocks of class ``cls`` with this key run ``graph``, if no earlier one fits."""
        graphs = (*self._admitted.get((cls, key), ()), graph)
        self._admitted[cls, key] = tuple(dict.fromkeys(graphs))

    def leave_eager(self, cls: type[nn.Module], key: Key) -> None:
        """Calls of this kind run eagerly on this rank, because there may be no further graph of ``cls``."""
        self._over_limit.add((cls, key))

    def refuse(self, reason: str) -> None:
        """Run eagerly from now on."""
        self.reason = reason

    def stats(self) -> CompiledComponentStats:
        state: State = "eager" if self.reason is not None else "compiled" if self._admitted else "waiting"
        return CompiledComponentStats(
            state=state,
            reason=self.reason,
            graphs={cls.__name__: program.graphs for cls, program in self._programs.items()},
            kinds=len(self._admitted),
            kinds_over_limit=len(self._over_limit),
            compile_s=round(self.seconds, 1),
            calls=self._calls,
            eager_calls=self._eager,
        )

    def call(self, block: nn.Module, plain: Plain, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._active or torch.is_grad_enabled():
            return plain(*args, **kwargs)
        self._calls += 1
        if self.reason is not None or self._has_unequal_parts() or collects_within_layers():
            self._eager += 1
            return plain(*args, **kwargs)
        program = self._programs[library_class(block)]
        arguments = contiguous(args, kwargs)
        key = (signature_of(arguments), _adapters(block))
        for graph in self._admitted.get((program.cls, key), ()):
            with suppress(DoesNotFit):
                return graph.run(block, arguments)
        self._missed(program, key, block, arguments)
        return plain(*args, **kwargs)

    def _missed(self, program: Program, key: Key, block: nn.Module, arguments: Arguments) -> None:
        """The call runs eagerly. Have it compiled, unless that was tried."""
        self._eager += 1
        if self._attempts[program.cls, key] == ATTEMPTS:
            return
        self._queue.offer((self.name, program.cls, key), lambda: self._job(program, key, block, arguments))

    def _has_unequal_parts(self) -> bool:
        """True if the ranks have parts of other lengths of a sequence: each would need a graph for its own."""
        if self._exchange is None or not self._exchange.ulysses_anything:
            return False
        if not self._warned:
            self._warned = True
            log.warning("%s runs eagerly where its ranks have unequal parts of a sequence", self.name)
        return True

    def _job(self, program: Program, key: Key, block: nn.Module, arguments: Arguments) -> Job:
        self._attempts[program.cls, key] += 1
        own, own_arguments = copied(block, arguments)
        return Job(self, program, key, own, own_arguments)


def _adapters(block: nn.Module) -> Hashable:
    """The kinds of factors that the block's layers read; ``None`` without adapted layers."""
    layer = next((part for part in block.modules() if is_adaptable(part)), None)
    if not isinstance(layer, AdaptedLayer):
        return None
    return tuple((type(rows), rows.kind) for rows in layer.lora.active.now)
