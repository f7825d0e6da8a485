"""Each rank's part in tests of compilation where ranks share rows; in a module that other processes can import."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from safelight.protocol.adapters import SetAdapters
from safelight.protocol.config import Config
from safelight.tests.ranks import TIMEOUT_S
from safelight.tests.worker.lora import agreement
from safelight.tests.worker.splitting import CPU, Drawn
from safelight.worker.accuracy.judging import judge
from safelight.worker.accuracy.policy import load_policy
from safelight.worker.caching.caching import Caching
from safelight.worker.compiling.compiler import Compiler
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.forward.row_division import RowDivision
from safelight.worker.internals import dynamo
from safelight.worker.lora.rank_adapters import RankAdapters
from safelight.worker.model.model import load_model
from safelight.worker.parallel.mesh import Mesh
from safelight.worker.requests.sample import SampleRun

NAME = "transformer"


def halves_draw_as_one_rank(mesh: Mesh, backend: str, families: Sequence[Drawn]) -> None:
    for drawn in families:
        torch._dynamo.reset()
        Half(mesh, backend, drawn).draws_as_one_rank()


class Half:
    """This rank, with one of the rows of guidance. The ranks of the second half compile when they are released."""

    def __init__(self, mesh: Mesh, backend: str, drawn: Drawn) -> None:
        config = Config(model=str(drawn.checkpoint), device="cpu", tp=mesh.tp.size, ulysses=mesh.axis("sp").size)
        self.mesh, self.drawn = mesh, drawn
        self.is_late = mesh.axis("cfg").rank == 1
        self.model = load_model(config, CPU, mesh.tp, mesh.axis("sp"))
        self.adapters = agreement.new_adapters(self.model, mesh.world)
        load_adapters(self.adapters, drawn)
        self.released = threading.Event()
        self.compiler = Compiler(
            {NAME: self.model.pipeline.transformer},
            partial(judge, load_policy()),
            partial(self._compiled, backend),
            [mesh.tp, mesh.axis("sp")],
        )
        division = RowDivision.of(mesh)
        resources = ForwardResources(adapters=self.adapters, compiled=self.compiler, division=division)
        self.batcher = Batcher(max_batch=16, max_tokens=10**6, agree=mesh.agree, resources=resources)
        self.caching = Caching(config, self.batcher.policy.unmergeable, self._agreed)

    def draws_as_one_rank(self) -> None:
        self.draw()
        if not self.is_late:
            self.compiler.wait()
        calls, eager = self.draw()
        assert eager == (calls if self.is_late else 0), "one half runs graphs already"
        self.released.set()
        self.compiler.wait()
        calls, eager = self.draw()
        assert eager == 0 < calls
        assert self.compiler.stats()[NAME].state == "compiled", self.compiler.stats()[NAME].reason

    def draw(self) -> tuple[int, int]:
        """The calls of blocks, and how many of them run eagerly, while the requests are drawn together."""
        before, counters = self.compiler.stats()[NAME], self.batcher.runner.counters
        divided = counters.divided
        runs = [self._start(asked) for asked in self.drawn.requests]
        while self.batcher.busy:
            self.batcher.step()
        for run, wanted in zip(runs, self.drawn.pictures, strict=True):
            assert run.coroutine.error is None, run.coroutine.error
            assert agreement.distance(run.coroutine.result, wanted) < 1e-4, self.drawn.checkpoint.name
        assert counters.divided > divided
        after = self.compiler.stats()[NAME]
        return after.calls - before.calls, after.eager_calls - before.eager_calls

    def _start(self, asked: Any) -> SampleRun:
        wanted = self.adapters.wanted(asked.lora)
        run = SampleRun(self.model, asked, 0, lambda *_: None, lambda _: None, wanted, caching=self.caching)
        self.batcher.start(run.coroutine)
        return run

    def _compiled(self, backend: str, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        assert not self.is_late or self.released.wait(TIMEOUT_S)
        compiled: Callable[..., Any] = dynamo.lookup_backend(backend)(graph, inputs)
        return compiled

    def _agreed(self, number: float) -> float:
        return float(self.mesh.world.all_gather(torch.tensor([number]))[0])


def load_adapters(adapters: RankAdapters, drawn: Drawn) -> None:
    if drawn.adapters:
        sources = [agreement.source(folder) for folder in drawn.adapters]
        names = [one.nickname for one in sources]
        change = SetAdapters(nicknames=names, strengths=[1.0] * len(names), mode="request", sources=sources)
        agreement.change(adapters, change)
