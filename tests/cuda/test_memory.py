"""A device that is short of memory costs no request that fits alone, and everything comes back afterwards."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from safelight.protocol.errors import ErrorInfo
from safelight.protocol.generation import Generate
from safelight.tests.played import Record
from safelight.worker.forward.policy import FORWARDS_TO_RECOVER

from .device import device, played_only
from .replica import Replica

pytestmark = played_only

SIDE = 64
CALLS = 4


@pytest.fixture(scope="module")
def replica(checkpoint: Callable[[str], Path]) -> Iterator[Replica]:
    found = Replica(checkpoint("flux"), device())
    yield found
    found.close()


def requests(replica: Replica, number: int = CALLS, **changes: Any) -> list[Generate]:
    size = {"width": SIDE, "height": SIDE, "num_inference_steps": 3}
    return [replica.request(index, **size | changes) for index in range(number)]


def peak(record: Record, run: Callable[[], object]) -> int:
    """Bytes that ``run`` needs beyond those that live before it."""
    gc.collect()
    memory = record.memory()
    before = memory.peak = memory.live
    run()
    return memory.peak - before


def limit(record: Record, free: int) -> None:
    gc.collect()
    record.memory().limit = record.memory().live + free


def test_a_group_too_large_for_the_memory_is_served_whole_and_the_cap_rises_again(
    replica: Replica, record: Record
) -> None:
    expected = list[torch.Tensor]()
    of_all = peak(record, lambda: expected.extend(replica.draw(*requests(replica))))
    of_one = peak(record, lambda: replica.draw(*requests(replica, 1)))
    limit(record, (of_all + of_one) // 2)
    short = replica.draw(*requests(replica))
    assert max((a - b).abs().max().item() for a, b in zip(short, expected, strict=True)) <= 1e-4
    assert replica.batcher.policy.caps, "a forward of all was too large"
    record.memory().limit = 10**12
    replica.draw(*requests(replica, num_inference_steps=FORWARDS_TO_RECOVER))
    assert replica.batcher.policy.max_positions("transformer") >= CALLS * (SIDE // 16) ** 2, "the cap rose again"


def test_a_request_that_fits_nowhere_is_a_503_and_holds_nothing(
    replica: Replica, record: Record, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "safelight")  # pytest would keep the exceptions, and their frames, with the log
    replica.draw(*requests(replica))
    gc.collect()
    before = record.memory().live
    limit(record, 200_000)
    answers = replica.answers(*requests(replica))
    assert [answer.status for answer in answers if isinstance(answer, ErrorInfo)] == [503] * CALLS
    record.memory().limit = 10**12
    del answers
    gc.collect()
    assert record.memory().live <= before, "failed requests hold no memory"
    assert all(isinstance(answer, torch.Tensor) for answer in replica.answers(*requests(replica)))


def test_finished_requests_leave_no_bytes_behind(replica: Replica, record: Record) -> None:
    replica.draw(*requests(replica))
    gc.collect()
    before = record.memory().live
    for _ in range(2):
        replica.draw(*requests(replica))
    gc.collect()
    assert record.memory().live == before
