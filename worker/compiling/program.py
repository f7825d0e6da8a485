"""The compiled forward of one class of blocks: all blocks of the class, in every component, share its graphs."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ..internals import dynamo
from ..internals.block_arguments import Arguments
from .arguments import mark_rows

Missed = Callable[[], None]
"""Called when a block has run eagerly because no graph fits."""

Backend = str | Callable[..., Any]
"""A compiler, as ``torch.compile`` takes it."""

LIMIT = 32
"""Graphs of one class, in place of dynamo's own limit of 8: sizes, numbers of rows and ranks of adapters need some."""


class LimitMet(Exception):
    """A class of blocks has as many graphs as dynamo keeps."""


class ForeignCollective(Exception):
    """A block calls other ranks by other ways than :mod:`..parallel.ranks`."""


class SettingsChanged(Exception):
    """A request changed torch's settings while a graph was made, which holds for none of them."""


class Program:
    """Compiles, and runs what was compiled, as two things: serving never waits for the compiler.

    dynamo keeps graphs by a function's code. So each class has a function with code of its own, and a limit of its own.
    """

    def __init__(self, cls: type[nn.Module], backend: Backend = "inductor") -> None:
        self.cls = cls
        self.graphs = 0
        name = f"forward_of_{cls.__name__}"
        function = FunctionType(_forward.__code__.replace(co_name=name), _forward.__globals__, name)
        # a block that does not trace as a whole raises, in place of running in pieces
        self._compile = torch.compile(function, backend=_without_collectives(backend), fullgraph=True)
        self._run = dynamo.run(function)

    def plain(self, block: nn.Module, arguments: Arguments) -> Any:
        """The forward of the block's class."""
        return self.cls.forward(block, *arguments.args, **arguments.kwargs)

    def run(self, block: nn.Module, arguments: Arguments, missed: Missed) -> Any:
        """Run the graph for these arguments. Without one, call ``missed`` and run eagerly."""
        return self._run(self.cls.forward, missed, block, arguments.args, arguments.kwargs)

    def compile(self, block: nn.Module, arguments: Arguments) -> None:
        """Make a graph for these arguments unless there is one. Raises ``LimitMet``, ``SettingsChanged`` or
        the compiler's exceptions.

        It holds for any number of rows from 2 on; other dimensions become dynamic when a second size is compiled.
        """
        mark_rows(arguments)
        before = dynamo.counters["stats"]["unique_graphs"]
        try:
            self._compile(self.cls.forward, _never, block, arguments.args, arguments.kwargs)
        except dynamo.RecompileLimitHit as error:
            raise LimitMet(f"{self.cls.__name__} has {LIMIT} graphs") from error
        except AssertionError as error:
            if dynamo.SETTINGS_CHANGED not in str(error):
                raise
            raise SettingsChanged from error
        self.graphs += dynamo.counters["stats"]["unique_graphs"] - before


def _forward(plain: Callable[..., Any], missed: Missed, block: nn.Module, args: Any, kwargs: Any) -> Any:
    if not torch.compiler.is_dynamo_compiling():  # a graph leaves this out: so it is Python that runs, not a graph
        missed()
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


def _never() -> None:
    """In place of ``missed`` while a graph is made."""
