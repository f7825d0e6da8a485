"""Each rank's part in tests of lockstep; in a module that the ranks' processes can import."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch
import zmq

from safelight.protocol.config import Config
from safelight.protocol.generation import Cancel, Failed, Generate, Result
from safelight.protocol.messages import FromWorker
from safelight.tests.worker.failing import COMPONENT, Bounded
from safelight.tests.worker.test_jobs import generate
from safelight.worker.crossing.call import Call, cross
from safelight.worker.crossing.coroutine import Coroutine
from safelight.worker.forward.batcher import Batcher
from safelight.worker.model.model import load_model
from safelight.worker.parallel.lockstep import Follower, Leader, RankDesync, Step, Stop
from safelight.worker.parallel.mesh import Mesh
from safelight.worker.parallel.ranks import RankLost, Ranks
from safelight.worker.requests import encoding_threads
from safelight.worker.requests.jobs import Jobs

Context = zmq.Context[zmq.Socket[bytes]]


def lockstep_of(ranks: Ranks, context: Context, rendezvous_path: str) -> Leader | Follower:
    if ranks.rank == 0:
        return Leader(context, rendezvous_path, ranks.size)
    return Follower(context, rendezvous_path, ranks.rank)


def fails_on_the_leader_alone(mesh: Mesh, checkpoint: str, rendezvous_path: str) -> None:
    """A request's first output fails while its others and another request are in progress."""
    ranks = mesh.tp
    model = load_model(Config(model=str(checkpoint), device="cpu", tp=ranks.size), torch.device("cpu"), ranks)
    sent, context = list[FromWorker](), zmq.Context()
    lockstep = lockstep_of(ranks, context, rendezvous_path)
    # one call per forward, so that one request ends before the other
    batcher = Batcher(max_batch=1, max_tokens=10**6, agree=mesh.agree, before_forward=lockstep.before_forward)
    served = Jobs(model, batcher, sent.append, is_primary=ranks.rank == 0)

    def run_step(step: Step) -> None:
        for request_id in step.dropped:
            served.drop(request_id)
        for message in step.messages:
            if isinstance(message, Generate):
                served.submit(message)
        batcher.step()

    if isinstance(lockstep, Follower):
        lockstep.run(run_step)
    else:
        _lead(lockstep, served, batcher, run_step)
        ended = {one.request_id: type(one) for one in sent if isinstance(one, Result | Failed)}
        assert ended == {"short": Failed, "other": Result}
    served.close()
    context.destroy(linger=500)


def _lead(leader: Leader, served: Jobs, batcher: Batcher, run_step: Callable[[Step], None]) -> None:
    widened, left = encoding_threads._widened, 1

    def short_once(pixels: torch.Tensor) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            raise torch.OutOfMemoryError
        return widened(pixels)

    encoding_threads._widened = short_once
    messages: list[Generate | Cancel] = [generate("short", outputs=3), generate("other", num_inference_steps=9)]
    while messages or batcher.busy or served.stats().running:
        step = Step([*messages], served.collect())
        messages = []
        leader.broadcast(step)
        run_step(step)
        time.sleep(0.001)
    leader.broadcast(Stop())


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
