"""Ranks that take a leader's turns; in a module that ranks' processes can import."""

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
from safelight.worker.parallel.mesh import Mesh
from safelight.worker.parallel.ranks import RankLost, Ranks
from safelight.worker.parallel.team import Diverged, Follower, Leader, Stop, Turn
from safelight.worker.requests import encoding_threads
from safelight.worker.requests.jobs import Jobs

Context = zmq.Context[zmq.Socket[bytes]]


def team_of(ranks: Ranks, context: Context, meeting_place: str) -> Leader | Follower:
    if ranks.rank == 0:
        return Leader(context, meeting_place, ranks.size)
    return Follower(context, meeting_place, ranks.rank)


def fails_on_the_leader_alone(mesh: Mesh, checkpoint: str, meeting_place: str) -> None:
    """Of a request's first output, while its others are in progress beside another request."""
    ranks = mesh.tp
    model = load_model(Config(model=str(checkpoint), device="cpu", tp=ranks.size), torch.device("cpu"), ranks)
    sent, context = list[FromWorker](), zmq.Context()
    team = team_of(ranks, context, meeting_place)
    batcher = Batcher(max_batch=1, max_tokens=10**6, agree=mesh.agree, meet=team.meet)  # so that one ends first
    served = Jobs(model, batcher, sent.append, is_primary=ranks.rank == 0)

    def take(turn: Turn) -> None:
        for request_id in turn.dropped:
            served.drop(request_id)
        for message in turn.messages:
            if isinstance(message, Generate):
                served.submit(message)
        batcher.step()

    if isinstance(team, Follower):
        team.run(take)
    else:
        _lead(team, served, batcher, take)
        ended = {one.request_id: type(one) for one in sent if isinstance(one, Result | Failed)}
        assert ended == {"short": Failed, "other": Result}
    served.close()
    context.destroy(linger=500)


def _lead(team: Leader, served: Jobs, batcher: Batcher, take: Callable[[Turn], None]) -> None:
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
        turn = Turn([*messages], served.collect())
        messages = []
        team.tell(turn)
        take(turn)
        time.sleep(0.001)
    team.tell(Stop())


def would_make_another_forward(mesh: Mesh, meeting_place: str) -> None:
    """One call has got lost on rank 1."""
    ranks = mesh.tp
    context = zmq.Context()
    team, component = team_of(ranks, context, meeting_place), Bounded(ranks, 4)
    batcher = Batcher(max_batch=1, max_tokens=10**6, agree=mesh.agree, meet=team.meet)
    coroutines = []
    for value in range(2):
        call = Call(COMPONENT, "forward", component, (torch.full((1, 1), float(value)),), {})
        coroutines.append(Coroutine(lambda call=call: cross(call), lambda _: None))
        batcher.start(coroutines[-1])
    if isinstance(team, Leader):
        team.tell(Turn([], []))
        with pytest.raises(RankLost):
            batcher.step()
    else:
        batcher.cancel(coroutines[0])
        with pytest.raises(Diverged, match="for other calls than the leader's"):
            team.run(lambda _: batcher.step())
        assert component.forwards == []
    os._exit(0)
