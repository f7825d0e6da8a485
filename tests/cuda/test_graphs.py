"""CUDA graphs of blocks on a CUDA device: captured by the device's own recorder, with the bits of plain blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safelight.tests.played import Record
from safelight.worker.graphs.cuda_recorder import CudaRecorder
from safelight.worker.graphs.recorder import NotRecordable

from .device import KIND, device, on_devices
from .replica import Replica, plain_pipeline

pytestmark = on_devices
CLOSE = 0.0 if KIND != "cuda" else 5e-3
"""The largest change of a pixel in [0, 1]: libraries may choose other kernels in a capture."""


def graphed(path: Path, place: torch.device) -> Replica:
    replica = Replica(path, place, graphed=True, max_batch=1)
    assert replica.batcher.resources.graphs is not None
    return replica


def test_blocks_are_captured_while_a_replica_serves_and_replayed_without_waits(
    checkpoint: Callable[[str], Path], record: Record
) -> None:
    place = device(1)
    replica = graphed(checkpoint("flux"), place)
    pipeline = plain_pipeline(checkpoint("flux"), place)
    requests = [replica.request(index, num_inference_steps=6) for index in range(3)]
    expected = [replica.plain(asked, pipeline) for asked in requests]
    record.clear()
    pictures = [replica.draw(asked)[0] for asked in requests]
    for picture, plain in zip(pictures, expected, strict=True):
        assert (picture - plain).abs().max().item() <= CLOSE
    assert replica.batcher.resources.graphs is not None
    stats = replica.batcher.resources.graphs.stats()
    assert stats.captures
    assert stats.replays > stats.captures
    assert all("has no repeated blocks" in reason for reason in stats.eager)
    assert [wait for wait in record.waits if "/graphs/" in wait.ours] == []
    replica.close()


def test_a_block_for_which_the_host_waits_is_refused_and_the_device_works_on() -> None:
    place = device()
    pool = CudaRecorder(place).new_pool()
    x = torch.ones(4, device=place)
    with pytest.raises(NotRecordable, match="captur"):
        pool.record(lambda: [x * x.sum().item()])
    recording = pool.record(lambda: [x * 2])
    x.fill_(3)
    recording.replay()
    assert recording.outputs[0].tolist() == [6, 6, 6, 6]
