"""Each rank's part in tests of ranks on devices of their own; in a module that the ranks' processes can import."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zmq
from safetensors.torch import load

from safelight.protocol.config import Config
from safelight.protocol.generation import Failed, Generate, Result
from safelight.protocol.messages import FromWorker
from safelight.tests import played
from safelight.tests.worker.failing import run
from safelight.tests.worker.leading import lockstep_of
from safelight.worker.forward.batch import Forward
from safelight.worker.forward.batcher import Batcher
from safelight.worker.model.model import load_model
from safelight.worker.parallel.lockstep import Follower, Leader, Step
from safelight.worker.parallel.mesh import Mesh
from safelight.worker.parallel.ranks import RankLost
from safelight.worker.requests import encoding_threads
from safelight.worker.requests.jobs import Jobs

from .device import DEVICES, KIND, PLAYED, TYPE

CLOSE = 1e-4 if KIND != "cuda" else 5e-3
"""The change by dividing layers among ranks."""


def own_device(rank: int) -> torch.device:
    """The device of ``rank``, which its process plays where there is none."""
    if PLAYED:
        played.install(DEVICES).notes_waits = False
    return torch.device("cpu") if TYPE == "cpu" else torch.device("cuda", rank)


def jobs_on(mesh: Mesh, checkpoint: str, batcher: Batcher, sent: list[FromWorker]) -> Jobs:
    place = mesh.world.device
    config = Config(model=checkpoint, device=place.type, dtype="float32", tp=mesh.tp.size)
    return Jobs(load_model(config, place, mesh.tp), batcher, sent.append, is_primary=mesh.world.rank == 0)


def fails_on_the_leader_alone(
    mesh: Mesh, checkpoint: str, rendezvous_path: str, failing: Generate, other: Generate, expected: torch.Tensor
) -> None:
    """``failing``'s first output fails on the leader, while its further ones and ``other`` are in progress."""
    sent, context = list[FromWorker](), zmq.Context[zmq.Socket[bytes]]()
    lockstep = lockstep_of(mesh.world, context, rendezvous_path)
    # one call per forward, so that one request ends before the other
    batcher = Batcher(max_batch=1, max_tokens=10**6, agree=mesh.agree, before_forward=lockstep.before_forward)
    served = jobs_on(mesh, checkpoint, batcher, sent)

    def run_step(step: Step) -> None:
        for request_id in step.dropped:
            served.drop(request_id)
        for message in step.messages:
            assert isinstance(message, Generate)
            served.submit(message)
        batcher.step()

    if isinstance(lockstep, Follower):
        lockstep.run(run_step)
    else:
        _lead(lockstep, served, batcher, run_step, [failing, other])
        ended = {one.request_id: one for one in sent if isinstance(one, Result | Failed)}
        assert isinstance(ended[failing.request_id], Failed)
        result = ended[other.request_id]
        assert isinstance(result, Result)
        assert (load(bytes(result.outputs[0].data))["t"] - expected).abs().max() <= CLOSE
    served.close()
    context.destroy(linger=500)


def _lead(
    leader: Leader, served: Jobs, batcher: Batcher, run_step: Callable[[Step], None], requests: list[Generate]
) -> None:
    widened, left = encoding_threads._widened, 1

    def short_once(pixels: torch.Tensor) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            raise torch.OutOfMemoryError
        return widened(pixels)

    encoding_threads._widened = short_once
    while requests or batcher.busy or served.stats().running:
        step = Step([*requests], served.collect())
        requests = []
        leader.broadcast(step)
        run_step(step)
        time.sleep(0.001)
    leader.stop()


class Shortage:
    """A stage that leaves the rank ``short`` little memory of its device when requests meet in a denoiser's forward."""

    name = "shortage"

    def __init__(self, mesh: Mesh, short: int) -> None:
        self._place = mesh.world.device
        self._is_short = mesh.world.rank == short
        self.forwards = 0

    def __call__(self, forward: Forward, proceed: Callable[[], list[Any]]) -> list[Any]:
        if forward.name == "transformer":
            self.forwards += 1
            if self._is_short:
                memory = played.RECORD.memory(self._place)
                memory.limit = memory.live + 10_000
        return proceed()


def is_short_of_memory_alone(mesh: Mesh, checkpoint: str, short: int, requests: list[Generate]) -> None:
    """The rank reports it and ends, which ends the others, who wait for it, long before their collective's timeout."""
    sent, batcher = list[FromWorker](), Batcher(max_batch=8, max_tokens=10**6, agree=mesh.agree)
    shortage = Shortage(mesh, short)
    batcher.runner.stages = [shortage, *batcher.runner.stages]
    served = jobs_on(mesh, checkpoint, batcher, sent)
    for asked in requests:
        served.submit(asked)
    with pytest.raises(RankLost) as lost:
        run(batcher)
    is_short = mesh.world.rank == short
    assert ("OutOfMemoryError, on this rank and not on all others" if is_short else "onnection") in str(lost.value)
    assert shortage.forwards == 1, "no smaller one has met the others' collective"
    assert batcher.policy.caps == {}
    assert not [one for one in sent if isinstance(one, Result | Failed)], "the scheduler repeats them"
    os._exit(0)  # as a replica's rank does, whose connections close by it
