"""The compiled forward of one class of blocks: all blocks of the class, in every component, share its graphs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ..internals import dynamo
from ..internals.block_arguments import Arguments
from .arguments import mark_rows

Backend = str | Callable[..., Any]
"""A compiler, as ``torch.compile`` takes it."""

LIMIT = 32
"""Graphs of one class: sizes, numbers of rows and ranks of adapters need some."""


class LimitMet(Exception):
    """A class of blocks has as many graphs as it may."""


class DoesNotFit(Exception):
    """The graph was made for other calls, or under other settings of torch."""


class ForeignCollective(Exception):
    """A block calls other ranks by other ways than :mod:`..parallel.ranks`."""


class SettingsChanged(Exception):
    """A request changed torch's settings while a graph was made, which holds for none of them."""


class Program:
    """Makes the graphs of one class of blocks."""

    def __init__(self, cls: type[nn.Module], backend: Backend = "inductor") -> None:
        self.cls = cls
        self._backend = _without_collectives(backend)
        self._graphs: list[Graph] = []

    @property
    def graphs(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def plain(self, block: nn.Module, arguments: Arguments) -> Any:
        """The forward of the block's class."""
        return self.cls.forward(block, *arguments.args, **arguments.kwargs)

    def compile(self, block: nn.Module, arguments: Arguments) -> Graph:
        """The graph for these arguments: the newest one that fits, or else a new one. Raises ``LimitMet``,
        ``SettingsChanged`` or the compiler's exceptions.

        It holds for any number of rows from 2 on; other dimensions become dynamic when a second size is compiled.
        """
        mark_rows(arguments)
        for graph in reversed(self._graphs):
            with suppress(DoesNotFit):
                graph.run(block, arguments)
                return graph
        if len(self._graphs) >= LIMIT:
            raise LimitMet(f"{self.cls.__name__} has {LIMIT} graphs")
        graph = Graph(self.cls, block, arguments, self._backend)
        self._graphs.append(graph)
        return graph


class Graph:
    """Compiles, and runs what was compiled, as two things: serving never waits for the compiler.

    dynamo keeps graphs by a function's code, and takes any of them that fits. So each graph has code of its own: a call
    runs the graph that was admitted for it, or none. What dynamo learns of dynamic sizes it keeps by the function's
    name, so all graphs of a class share that.
    """

    def __init__(self, cls: type[nn.Module], block: nn.Module, arguments: Arguments, backend: Backend) -> None:
        self._plain = cls.forward
        name = f"forward_of_{cls.__name__}"
        function = FunctionType(_forward.__code__.replace(co_name=name), _forward.__globals__, name)
        # a block that does not trace as a whole raises, in place of running in pieces
        compiled = torch.compile(function, backend=backend, fullgraph=True)
        try:
            compiled(self._plain, block, arguments.args, arguments.kwargs)
        except AssertionError as error:
            if dynamo.SETTINGS_CHANGED not in str(error):
                raise
            raise SettingsChanged from error
        self._run = dynamo.run(function)

    def run(self, block: nn.Module, arguments: Arguments) -> Any:
        """Run the graph for these arguments. Raises ``DoesNotFit``."""
        return self._run(self._plain, block, arguments.args, arguments.kwargs)


def _forward(plain: Callable[..., Any], block: nn.Module, args: Any, kwargs: Any) -> Any:
    if not torch.compiler.is_dynamo_compiling():  # a graph leaves this out: so it is Python that runs, not a graph
        raise DoesNotFit
    return plain(block, *args, **kwargs)


def _without_collectives(backend: Backend) -> Backend:
    """``backend``, which raises for a graph with collectives of torch: they would meet those of requests."""

    def compiled(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if node.op == "call_function" and any(part in str(node.target) for part in ("c10d", "distributed")):
                raise ForeignCollective(f"it calls {node.target}, beside the collectives of this rank")
        compiler = dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
        return compiler(graph, inputs)

    return compiled
