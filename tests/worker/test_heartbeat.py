"""Heartbeats of a worker whose loop is busy, as a scheduler's socket gets them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch
import zmq

from safelight.protocol.messages import FROM_WORKER
from safelight.protocol.replicas import Heartbeat, ReplicaStats
from safelight.worker.crossing.call import Call, cross
from safelight.worker.crossing.coroutine import Coroutine
from safelight.worker.forward.activity import Activity
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.rank.heartbeat import Heartbeats


class Listener:
    """The scheduler's socket, and the heartbeats that come by it."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.address = "inproc://backend"
        self._socket = context.socket(zmq.ROUTER)
        self._socket.rcvtimeo = 60_000
        self._socket.bind(self.address)

    def next(self) -> Heartbeat:
        identity, *body = self._socket.recv_multipart()
        message = FROM_WORKER.decode(body)
        assert isinstance(message, Heartbeat)
        assert identity == b"heartbeat-3"
        return message


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with zmq.Context() as context:
        yield context
        context.destroy(linger=0)


def test_heartbeats_go_on_while_the_loop_is_in_a_forward_and_say_for_how_long(
    context: zmq.Context[zmq.Socket[bytes]],
) -> None:
    listener, activity, heard = Listener(context), Activity(), list[Heartbeat]()

    def slow(x: torch.Tensor) -> torch.Tensor:
        heard.extend(listener.next() for _ in range(4))
        return x

    batcher = Batcher(max_batch=1, max_tokens=1, resources=ForwardResources(activity=activity))
    batcher.start(Coroutine(lambda: cross(Call("vae", "decode", slow, (torch.ones(1),), {})), lambda _: None))
    heartbeats = Heartbeats(context, listener.address, 3, activity, interval_s=0.01)
    activity.stats = ReplicaStats(forwards=7)
    heartbeats.start()
    batcher.step()
    while (after := listener.next()).forward_s is not None:
        pass
    heartbeats.stop()
    first, *_, last = heard = [beat for beat in heard if beat.forward_s is not None]
    assert [(beat.replica, beat.pid, beat.stats.forwards) for beat in heard] == [(3, os.getpid(), 7)] * len(heard)
    assert first.forward_s is not None
    assert last.forward_s is not None
    assert first.forward_s < last.forward_s
    assert first.progress == last.progress < after.progress, "the loop stands still within the forward alone"


def test_a_forward_that_raises_no_longer_counts_as_running() -> None:
    activity = Activity()
    with contextlib.suppress(ValueError), activity.forward():
        with activity.forward():
            pass
        assert activity.forward_s is not None, "the probe within it has ended"
        raise ValueError
    assert activity.forward_s is None
