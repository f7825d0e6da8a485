"""Each rank's part in tests of compilation on several ranks; in a module that other processes can import."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safelight.protocol.adapters import SetAdapters, Use
from safelight.protocol.config import Config
from safelight.tests.worker.lora import agreement
from safelight.worker.accuracy.judging import judge
from safelight.worker.accuracy.policy import load_policy
from safelight.worker.compiling.compiler import FORWARDS, Compiler
from safelight.worker.lora.rank_adapters import RankAdapters
from safelight.worker.model.model import load_model
from safelight.worker.parallel.layers import GatheredColumnLinear, RowParallelLinear
from safelight.worker.parallel.mesh import Mesh
from safelight.worker.parallel.ranks import Ranks

CPU = torch.device("cpu")
NAME = "transformer"
GROWTH = 1.25
"""An update that is exact in every dtype and for every part of a weight."""


@dataclass(frozen=True)
class Known:
    """A denoiser's call, with the outputs in fp64 and of the plain whole module: as it is, updated, with an adapter."""

    checkpoint: Path
    adapter: Path
    arguments: Mapping[str, Any]
    exact: Sequence[torch.Tensor]
    plain: Sequence[torch.Tensor]


def compiles(mesh: Mesh, backend: str, families: Sequence[Known]) -> None:
    """One start of all ranks for all of it, since starting takes longer."""
    if mesh.tp.size > 1:
        ranks_change_in_the_same_forward(mesh)
        a_graph_that_one_rank_refuses_serves_on_none(mesh)
        a_kind_of_call_of_one_rank_alone_is_not_waited_for(mesh)
        a_refusal_for_a_call_of_one_rank_alone_holds_on_all(mesh)
    for known in families:
        a_family_computes_what_the_whole_does(mesh, backend, known)


class Layer(nn.Module):
    """A block with all collectives of divided layers."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.rows, self.gathered = nn.Linear(8, 8), nn.Linear(8, 8 // ranks.size)
        for part, cls in ((self.rows, RowParallelLinear), (self.gathered, GatheredColumnLinear)):
            part.__class__ = cls
            vars(part)["ranks"] = ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = x + self.gathered(self.rows(x).tanh())
        return output


class Compiling:
    """A compiler of a stack of layers on each rank."""

    def __init__(self, mesh: Mesh, backend: Any) -> None:
        torch.manual_seed(mesh.tp.rank)
        self.mesh = mesh
        self.blocks = nn.ModuleList([Layer(mesh.tp), Layer(mesh.tp)]).requires_grad_(False)
        self.compiler = Compiler({NAME: self.blocks}, partial(judge, load_policy()), backend, [mesh.tp])

    def forward(self, x: torch.Tensor) -> None:
        plain = x
        for block in self.blocks:
            plain = type(block).__bases__[1].forward(block, plain)
        with self.compiler.active(NAME):
            for block in self.blocks:
                x = block(x)
        assert torch.equal(x, plain)

    @property
    def eager_calls(self) -> list[int]:
        """The eager calls of each rank."""
        own = self.compiler.stats()[NAME].eager_calls
        return [int(one) for one in self.mesh.tp.all_gather(torch.tensor(own))]


def ranks_change_in_the_same_forward(mesh: Mesh) -> None:
    released = threading.Event()

    def slow(graph: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        assert mesh.tp.rank == 0 or released.wait(60)
        return graph.forward

    running = Compiling(mesh, slow)
    for _ in range(3 * FORWARDS):
        running.forward(torch.ones(2, 8))
        assert len(set(running.eager_calls)) == 1
    assert running.eager_calls[0] == running.compiler.stats()[NAME].calls, "rank 0 waits for the other one"
    released.set()
    running.compiler.wait()
    before, traffic = running.eager_calls, mesh.tp.traffic.calls
    running.forward(torch.ones(2, 8))
    assert mesh.tp.traffic.calls - traffic == 2 * 2 * 2, "collectives in graphs are counted like the plain ones"
    assert running.eager_calls == before


def a_graph_that_one_rank_refuses_serves_on_none(mesh: Mesh) -> None:
    def wrong(graph: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        factor = 1.05 if mesh.tp.rank == 1 else 1.0
        return lambda *args: [value * factor for value in graph(*args)]

    running = Compiling(mesh, wrong)
    for _ in range(2):
        running.forward(torch.ones(2, 8))
        running.compiler.wait()
    stats = running.compiler.stats()[NAME]
    assert (stats.state, stats.calls) == ("eager", stats.eager_calls)
    assert str(stats.reason).startswith("Layer: relative L2")


def a_kind_of_call_of_one_rank_alone_is_not_waited_for(mesh: Mesh) -> None:
    blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 8), nn.TransformerEncoderLayer(8, 2, 8)]).eval()
    compiler = Compiler({NAME: blocks.requires_grad_(False)}, partial(judge, load_policy()), "eager", [mesh.tp])
    for everywhere in (False, True, True):
        eager = compiler.stats()[NAME].eager_calls
        with compiler.active(NAME):
            if everywhere or mesh.tp.rank == 1:
                blocks[0](torch.ones(2, 3, 8))
        compiler.wait()
        assert compiler.stats()[NAME].state == ("compiled" if everywhere else "waiting")
    assert compiler.stats()[NAME].eager_calls == eager


def a_refusal_for_a_call_of_one_rank_alone_holds_on_all(mesh: Mesh) -> None:
    def broken(graph: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        raise RuntimeError("there is no memory")

    blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 8), nn.TransformerEncoderLayer(8, 2, 8)]).eval()
    axes = [mesh.tp, mesh.axis("sp")]
    compiler = Compiler({NAME: blocks.requires_grad_(False)}, partial(judge, load_policy()), broken, axes)
    with compiler.active(NAME):
        if mesh.world.rank == 1:
            blocks[0](torch.ones(2, 3, 8))
    compiler.wait()
    stats = compiler.stats()[NAME]
    assert stats.state == "eager"
    assert "TransformerEncoderLayer does not compile" in str(stats.reason)


def a_family_computes_what_the_whole_does(mesh: Mesh, backend: str, known: Known) -> None:
    torch._dynamo.reset()
    config = Config(model=str(known.checkpoint), dtype="bfloat16", tp=mesh.tp.size, ulysses=mesh.axis("sp").size)
    model = load_model(config, CPU, mesh.tp, mesh.axis("sp"))
    adapters = agreement.new_adapters(model, mesh.world)
    load_adapter(adapters, known.adapter)
    denoiser, policy = model.pipeline.transformer, load_policy()
    compiler = Compiler({NAME: denoiser}, partial(judge, policy), backend, [mesh.tp, mesh.axis("sp")])
    for index, uses in enumerate(((), (), (Use(known.adapter.name, 1.0),))):
        if index == 1:
            grow(denoiser)
        for _ in range(2):
            eager = compiler.stats()[NAME].eager_calls
            with applied(adapters, uses), compiler.active(NAME):
                found = denoiser(**known.arguments)[0]
            compiler.wait()
        stats = compiler.stats()[NAME]
        assert stats.state == "compiled", (known.checkpoint.name, stats.reason)
        assert stats.eager_calls == eager, "the second forward runs graphs"
        fault = judge(policy, [found], [known.plain[index]], [known.exact[index]])
        assert fault is None, (known.checkpoint.name, index, fault)
        assert all(torch.equal(one, found) for one in mesh.world.all_gather(found)), "the same bits on every rank"


def load_adapter(adapters: RankAdapters, folder: Path) -> None:
    source = agreement.source(folder)
    agreement.change(
        adapters, SetAdapters(nicknames=[source.nickname], strengths=[1.0], mode="request", sources=[source])
    )


def applied(adapters: RankAdapters, uses: Sequence[Use]) -> AbstractContextManager[None]:
    if not uses:
        return nullcontext()
    return adapters.applied(NAME, [(1, adapters.uses(NAME, adapters.wanted(list(uses))))])


def grow(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.mul_(GROWTH)
