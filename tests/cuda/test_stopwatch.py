"""A forward that the GPU still computes counts as one, wherever the loop waits for it, so that no stall is reported."""

from __future__ import annotations

import pytest
import torch

from safelight.worker.forward.activity import Activity
from safelight.worker.forward.stopwatch import Stopwatch

from .device import device, played_only

pytestmark = played_only


def test_heartbeats_report_the_forward_that_the_device_still_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    stopwatch, activity, seen = Stopwatch(device()), Activity(), list[float]()
    activity.on_device = lambda: stopwatch.running_s
    done = False
    monkeypatch.setattr(torch.cuda.Event, "query", lambda _: done)
    assert activity.forward_s is None
    for _ in range(2):
        with activity.forward(), stopwatch.timed(seen.append):
            pass  # its call returns, and the device goes on
    first = activity.forward_s
    assert first is not None
    assert (activity.forward_s or 0) >= first
    assert seen == []
    done = True
    assert activity.forward_s is None
    stopwatch.collect()
    assert len(seen) == 2
