"""Saved forwards on a device: guidance pairing without waits, and the step cache with one number a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safelight.protocol.forward_options import ForwardOptions
from safelight.tests.played import Record
from safelight.worker.caching.caching import Caching
from safelight.worker.caching.late_check import LateCheck, PredictionWrong
from safelight.worker.requests.jobs import Jobs

from .device import device, played_only
from .replica import Replica


def caching_replica(checkpoint: Path) -> tuple[Replica, Caching]:
    replica, caching = Replica(checkpoint, device()), Caching(ForwardOptions(), {})
    replica.jobs.close()
    replica.jobs = Jobs(replica.model, replica.batcher, replica.sent.append, adapters=replica.adapters, caching=caching)
    return replica, caching


@pytest.mark.parametrize("family", ["qwenimage", "wan"])
@played_only
def test_guidance_pairing_does_not_wait_for_the_device(
    family: str, checkpoint: Callable[[str], Path], record: Record
) -> None:
    """Qwen-Image computes the timestep of each call, so only its value can be compared."""
    replica, caching = caching_replica(checkpoint(family))
    same = {} if family == "wan" else {"negative_prompt": replica.request(0).samples[0].prompt}
    replica.draw(replica.request(0, num_inference_steps=5, **same))
    record.clear()
    replica.draw(replica.request(0, num_inference_steps=5, **same))
    assert caching.counts() == {"predicted_calls": 8, "missed_predictions": 0, "skipped_forwards": 0}
    ours = [wait.ours for wait in record.waits if "worker/caching" in wait.ours]
    assert len(ours) <= 4, "only the first step of a request is compared at once"
    assert all("prediction.py" in place for place in ours)


@played_only
def test_the_step_cache_waits_once_a_step(checkpoint: Callable[[str], Path], record: Record) -> None:
    replica, caching = caching_replica(checkpoint("flux"))
    replica.draw(replica.request(0, num_inference_steps=12, cache=1.0))
    assert caching.counts()["skipped_forwards"] > 0
    ours = [wait.ours for wait in record.waits if "worker/caching" in wait.ours]
    assert 0 < len(ours) <= 12
    assert all("step_cache.py" in place for place in ours)


def test_a_timestep_that_differs_on_the_device_is_found_before_the_result_is_used() -> None:
    late, one = LateCheck(), torch.ones(2, device=device())
    late.expect_equal([(one, one.clone())])
    late.expect_equal([(one, one + 1)])
    with pytest.raises(PredictionWrong):
        late.settle()
