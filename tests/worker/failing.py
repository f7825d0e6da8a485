"""Forwards that fail on some ranks or on all; in a module that ranks' processes can import."""

from __future__ import annotations

import pytest
import torch

from safelight.worker.crossing.call import Call, cross
from safelight.worker.crossing.coroutine import Coroutine
from safelight.worker.forward.batcher import Batcher
from safelight.worker.parallel.mesh import Mesh
from safelight.worker.parallel.ranks import RankLost, Ranks

COMPONENT = "transformer"


class Bounded:
    """A component, divided among ``ranks``, that has memory for ``rows`` at once on this one."""

    def __init__(self, ranks: Ranks, rows: int) -> None:
        self._ranks = ranks
        self._rows = rows
        self.forwards: list[int] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards.append(len(x))
        if len(x) > self._rows:
            raise torch.OutOfMemoryError
        return self._ranks.all_reduce(x.clone())


def drawn(batcher: Batcher, component: Bounded, number: int) -> list[Coroutine]:
    """The coroutines of ``number`` calls, when all have ended."""

    def calls(value: int) -> float:
        call = Call(COMPONENT, "forward", component, (torch.full((1, 1), float(value)),), {})
        return float(cross(call)[0, 0])

    coroutines = [Coroutine(lambda value=value: calls(value), lambda _: None) for value in range(1, number + 1)]
    for coroutine in coroutines:
        batcher.start(coroutine)
    run(batcher)
    return coroutines


def run(batcher: Batcher) -> None:
    while batcher.busy:
        batcher.step()


def is_short_of_memory_on_all(mesh: Mesh) -> None:
    """All go on with halves, and what they say to each other is the layers' sums alone."""
    ranks = mesh.tp
    batcher, component = Batcher(max_batch=8, max_tokens=10**6, agree=mesh.agree), Bounded(ranks, 2)
    coroutines = drawn(batcher, component, 8)
    assert [one.result for one in coroutines] == [float(ranks.size * value) for value in range(1, 9)]
    assert component.forwards == [8, 4, 2, 2, 2, 2]
    assert (batcher.policy.caps, ranks.traffic.calls) == ({f"{COMPONENT}.forward": 2}, 4)


def fails_in_another_forward(mesh: Mesh) -> None:
    """After its last collective, one fails; the other, which has seen nothing of that, fails in its next forward."""
    ranks = mesh.tp
    batcher = Batcher(max_batch=1, max_tokens=10**6, agree=mesh.agree)

    def forward(x: torch.Tensor) -> torch.Tensor:
        if ranks.rank == int(x[0, 0]):
            raise ValueError(x)
        return x

    for value in range(2):
        call = Call(COMPONENT, "forward", forward, (torch.full((1, 1), float(value)),), {})
        batcher.start(Coroutine(lambda call=call: cross(call), lambda _: None))
    with pytest.raises(RankLost, match="something else on another rank"):
        run(batcher)
