"""Each rank's part in tests of lockstep; in a module that the ranks' processes can import."""

from __future__ import annotations

import os

import pytest
import torch
import zmq

from safelight.tests.worker.failing import COMPONENT, Bounded
from safelight.worker.crossing.call import Call, cross
from safelight.worker.crossing.coroutine import Coroutine
from safelight.worker.forward.batcher import Batcher
from safelight.worker.parallel.lockstep import Follower, Leader, RankDesync, Step
from safelight.worker.parallel.mesh import Mesh
from safelight.worker.parallel.ranks import RankLost, Ranks

Context = zmq.Context[zmq.Socket[bytes]]


def lockstep_of(ranks: Ranks, context: Context, rendezvous_path: str) -> Leader | Follower:
    if ranks.rank == 0:
        return Leader(context, rendezvous_path, ranks.size)
    return Follower(context, rendezvous_path, ranks.rank)


def would_make_another_forward(mesh: Mesh, rendezvous_path: str) -> None:
    """Rank 1 has lost one call."""
    ranks = mesh.tp
    context = zmq.Context()
    lockstep, component = lockstep_of(ranks, context, rendezvous_path), Bounded(ranks, 4)
    batcher = Batcher(max_batch=1, max_tokens=10**6, agree=mesh.agree, before_forward=lockstep.before_forward)
    coroutines = []
    for value in range(2):
        call = Call(COMPONENT, "forward", component, (torch.full((1, 1), float(value)),), {})
        coroutines.append(Coroutine(lambda call=call: cross(call), lambda _: None))
        batcher.start(coroutines[-1])
    if isinstance(lockstep, Leader):
        lockstep.broadcast(Step([], []))
        with pytest.raises(RankLost):
            batcher.step()
    else:
        batcher.cancel(coroutines[0])
        with pytest.raises(RankDesync, match="for other calls than the leader's"):
            lockstep.run(lambda _: batcher.step())
        assert component.forwards == []
    os._exit(0)
