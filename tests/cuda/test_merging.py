"""How many requests share a forward follows from the device's speed, which these tests play."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safelight.tests.played import RECORD
from safelight.worker.forward.batch import Forward

from .device import device, played_only
from .replica import Replica

pytestmark = played_only

REQUESTS, STEPS = 4, 10


class Paced:
    """A stage, within the timing one, that lets a forward take as long as ``seconds`` says for its calls."""

    name = "pace"

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self._seconds = seconds
        self.now = 0.0
        self.sizes: list[int] = []

    def __call__(self, forward: Forward, proceed: Callable[[], list[Any]]) -> list[Any]:
        answers = proceed()
        if forward.name == "transformer":
            self.now += self._seconds(len(forward.calls))
            self.sizes.append(len(forward.calls))
        return answers


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(lambda calls: 0.125 * calls, 1), (lambda calls: 0.3 + 0.05 * calls, REQUESTS)],
    ids=["busy with one", "gains by more"],
)
def test_as_many_share_a_forward_as_make_it_faster(
    seconds: Callable[[int], float],
    expected: int,
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU that one large picture keeps busy, no request waits for the step of another."""
    replica, paced = Replica(checkpoint("flux"), device(), measured=True, max_batch=REQUESTS), Paced(seconds)
    monkeypatch.setattr(RECORD, "clock", lambda: paced.now)
    replica.batcher.runner.stages = [*replica.batcher.runner.stages, paced]
    replica.draw(*[replica.request(index, num_inference_steps=STEPS) for index in range(REQUESTS)])
    assert paced.sizes[0] == 1, "nothing is known at first"
    ((usual, _),) = Counter(paced.sizes).most_common(1)
    assert usual == expected, paced.sizes
    (limit,) = [one for one in replica.model.timing.merge_limits() if one.name == "transformer"]
    assert limit.outputs == expected
    assert limit.seconds["1"] == pytest.approx(seconds(1))
    replica.close()
