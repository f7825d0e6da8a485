"""A toy component of two blocks, called through the batcher as pipelines call components."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from safelight.tests.worker.graphs.recording import TapeRecorder
from safelight.worker.crossing.call import Call, cross
from safelight.worker.crossing.coroutine import Coroutine
from safelight.worker.crossing.random_state import seeded
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.graphs.graphs import Graphs

Extra = Callable[["Block", torch.Tensor, torch.Tensor], torch.Tensor]
"""Makes a block's answer of its output, the second, and its argument, the third."""


class Block(nn.Module):
    def __init__(self, extra: Extra | None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.extra = extra
        self.attribute = 0

    def forward(self, x: torch.Tensor, image: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
        y: torch.Tensor = self.linear(x).tanh() * scale
        if image is not None:
            y = y + image
        return y if self.extra is None else self.extra(self, y, x)


class Toy(nn.Module):
    def __init__(self, extra: Extra | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(extra) for _ in range(2))

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, **kwargs)
        return x


class Run:
    """A graphed :attr:`toy`, and the same one without graphs."""

    def __init__(self, extra: Extra | None = None, *, max_bytes: int = 10**9, record_after: int = 1) -> None:
        self.toy, self.plain = Toy(extra).eval(), Toy(extra).eval()
        self.recorder = TapeRecorder()
        self.graphs = Graphs(
            {"transformer": self.toy}, self.recorder, None, max_bytes=max_bytes, record_after=record_after
        )
        self.batcher = Batcher(max_batch=4, max_tokens=10**6, resources=ForwardResources(graphs=self.graphs))

    def __call__(
        self, *calls: Call, body: Callable[[Call], Any] = cross, seed: int = 0, exclusive: bool = False
    ) -> list[Any]:
        """The answers of calls that are made at once, each by ``body``. Raises the first error."""
        coroutines = [
            Coroutine(partial(body, call), lambda _: None, exclusive=exclusive, random=seeded(seed)) for call in calls
        ]
        for coroutine in coroutines:
            self.batcher.start(coroutine)
        while self.batcher.busy:
            self.batcher.step()
        for coroutine in coroutines:
            if coroutine.error is not None:
                raise coroutine.error
        return [coroutine.result for coroutine in coroutines]

    def call(self, x: torch.Tensor, **kwargs: Any) -> Call:
        return Call("transformer", "__call__", self.toy, (x,), kwargs)

    def is_right(self, x: torch.Tensor, **kwargs: Any) -> bool:
        """True if the graphed toy computes what the plain one does."""
        return torch.equal(self(self.call(x, **kwargs))[0], self.plain(x, **kwargs))

    @property
    def counts(self) -> tuple[int, int, int]:
        """Captures, replays and misses."""
        stats = self.graphs.stats()
        return stats.captures, stats.replays, stats.misses


def rows(seed: int, number: int = 1) -> torch.Tensor:
    return torch.randn(number, 3, 4, generator=torch.Generator().manual_seed(seed))
