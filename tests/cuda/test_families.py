"""Every kind of model on a device that is not the first: its self-test, and its pictures beside plain diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from safelight.tests.effort import chosen
from safelight.tests.played import RECORD
from safelight.worker.self_test.self_test import SelfTest

from .device import KIND, PLAYED, device
from .replica import Replica, plain_pipeline

CLOSE = 1e-4 if KIND != "cuda" else 5e-3
"""The largest change of a pixel in [0, 1] by merging: cuDNN rounds to TF32, and batch sizes differ in kernels."""

FAMILIES = ("sdxl", "sd3", "zimage", "qwenimage", "wan")


@pytest.mark.parametrize("family", chosen("flux", nightly=FAMILIES) if PLAYED else ["flux", *FAMILIES])
def test_a_model_is_tested_and_served_on_its_own_gpu_with_the_bits_of_plain_diffusers_there(
    family: str, checkpoint: Callable[[str], Path]
) -> None:
    place = device(1)
    before = _allocations_elsewhere(place)
    replica = Replica(checkpoint(family), place)
    found = SelfTest(replica.model, replica.config).run()
    assert found.mode == "merged", found.text
    assert not found.unmergeable
    pipeline = plain_pipeline(checkpoint(family), place)
    requests = [replica.request(index) for index in range(3)]
    expected = [replica.plain(asked, pipeline) for asked in requests]
    together = replica.draw(*requests)
    counters = replica.batcher.runner.counters
    assert counters.forwards < counters.calls, "requests met"
    assert max((a - b).abs().max().item() for a, b in zip(together, expected, strict=True)) <= CLOSE
    (alone,) = replica.draw(msgspec.structs.replace(requests[0], deterministic=True))
    assert torch.equal(alone, expected[0])
    assert _allocations_elsewhere(place) == before, "everything is on the replica's own device"
    replica.close()


def _allocations_elsewhere(place: torch.device) -> int:
    """A count that another device's use changes: allocations on the played one, bytes on a real one."""
    if place.type == "cpu" or place.index == 0:
        return 0
    return RECORD.memory(0).allocations if PLAYED else torch.cuda.memory_allocated(0)
