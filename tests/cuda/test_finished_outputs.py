"""Finished outputs leave the GPU at once, beside the next forward, and are whole when they are encoded."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from safelight.protocol.generation import Result
from safelight.protocol.rollouts import Rollout
from safelight.tests.played import Record

from .device import device, on_devices, played_only
from .replica import Replica, plain_pipeline

pytestmark = on_devices

SMALL = 10_000
"""Bytes that the schedule of a sample may keep; its picture has five times as many."""


@pytest.fixture(scope="module")
def replica(checkpoint: Callable[[str], Path]) -> Iterator[Replica]:
    found = Replica(checkpoint("flux"), device())
    yield found
    found.close()


@played_only
def test_a_copy_that_is_late_is_waited_for_and_its_source_is_not_freed_before(
    replica: Replica, lagging: None, record: Record, checkpoint: Callable[[str], Path]
) -> None:
    expected = replica.plain(replica.request(0), plain_pipeline(checkpoint("flux"), device()))
    record.clear()
    (found,) = replica.draw(replica.request(0, deterministic=True))
    assert torch.equal(found, expected)
    assert record.operators["copy D2H without waiting"] == 1
    assert record.operators["wait: event.synchronize"] == 1
    assert not [wait for wait in record.waits if wait.kind == "copy D2H" and "encoding_threads" in wait.ours]


@played_only
def test_every_tensor_of_a_rollout_leaves_the_device_without_a_wait_of_the_loop(
    replica: Replica, lagging: None, record: Record
) -> None:
    rollout = Rollout(returns_trajectory=True, generator_device="cuda")
    replica.jobs.submit(replica.request(2, num_inference_steps=3, rollout=rollout))
    record.clear()
    replica.settle()
    assert [type(message) for message in replica.sent] == [Result]
    ours = {wait.ours.partition(":")[0] for wait in record.waits if wait.kind == "copy D2H"}
    assert not ours & {"worker/rollout/record.py", "worker/requests/jobs.py", "worker/requests/encoding_threads.py"}


def test_an_output_that_waits_for_an_encoding_thread_holds_nothing_on_the_gpu(replica: Replica) -> None:
    replica.draw(replica.request(1))
    live = torch.cuda.memory_allocated(device())
    free = threading.Event()
    pool = replica.jobs._threads._threads
    for _ in range(pool._max_workers):
        pool.submit(free.wait)
    try:
        replica.jobs.submit(replica.request(1))
        while replica.batcher.busy:
            replica.batcher.step()
        torch.cuda.synchronize(device())
        assert torch.cuda.memory_allocated(device()) - live < SMALL
    finally:
        free.set()
    replica.settle()


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_a_request_that_ends_early_leaves_nothing_on_the_gpu_for_the_garbage_collector(
    how: str, replica: Replica
) -> None:
    replica.draw(replica.request(1))
    gc.collect()
    live = torch.cuda.memory_allocated(device())
    gc.disable()
    try:
        replica.jobs.submit(replica.request(1, num_inference_steps=8))
        for _ in range(5):
            replica.batcher.step()
        assert torch.cuda.memory_allocated(device()) > live
        if how == "cancelled":
            replica.jobs.cancel("1")
        else:
            with replica.model.pipeline.transformer.norm_out.register_forward_pre_hook(_fails):
                replica.settle()
        assert torch.cuda.memory_allocated(device()) - live < SMALL
    finally:
        gc.enable()


def _fails(*_: object) -> None:
    raise ValueError("planted")


@played_only
def test_the_peak_memory_of_a_rollout_is_its_own_and_not_that_of_a_larger_one_before(replica: Replica) -> None:
    asked = replica.request(2, rollout=Rollout(returns_trajectory=True))
    peaks = []
    for side in (64, 192, 64):
        replica.sent.clear()
        replica.jobs.submit(msgspec.structs.replace(asked, width=side, height=side))
        replica.settle()
        (result,) = (message for message in replica.sent if isinstance(message, Result))
        assert result.outputs[0].rolled_out is not None
        peaks.append(result.outputs[0].rolled_out.reply["peak_memory_mb"])
    assert peaks[1] > 1.05 * peaks[0]
    assert peaks[2] == pytest.approx(peaks[0], rel=0.02)
