"""The host never waits for the device between two forwards, so that it prepares the next one while the device computes.

Each wait is found with the file and line of the innermost code of ours. Schedulers and models of diffusers wait by
themselves in some families, as in a plain pipeline; those waits are not counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from safelight.protocol.generation import Result
from safelight.protocol.rollouts import Rollout
from safelight.tests.effort import chosen
from safelight.tests.played import Record, Wait
from safelight.worker.forward.batch import Forward
from safelight.worker.pipelines.components import DENOISERS

from .device import device, played_only
from .replica import Replica

pytestmark = played_only

BEFORE, AFTER = "launch", "launched"

ONCE_A_REQUEST = {
    "worker/forward/signature.py digest",  # of a prompt's tokens, and of ids that requests share
    "worker/requests/encoding_threads.py _encode_output",  # in a thread
}
"""Where our code may wait, by file and function; never within the steps."""


class Marking:
    """A stage that marks each forward in the record."""

    name = "marks"

    def __init__(self, record: Record) -> None:
        self._record = record

    def __call__(self, forward: Forward, proceed: Callable[[], list[Any]]) -> list[Any]:
        self._record.mark(f"{BEFORE} {forward.name}")
        answers = proceed()
        self._record.mark(f"{AFTER} {forward.name}")
        return answers


def waits_of_steps(record: Record, steps: int | None = None) -> list[Wait]:
    """Our own waits between the second and the last forward of the denoiser, outside of forwards.

    Of ``steps`` steps with equally many forwards, those from the second step on.
    """
    launches = [number for number, event in enumerate(record.events) if _is_of_denoiser(event, BEFORE)]
    assert len(launches) >= 4, "there are steps in the middle"
    found, inside = [], False
    first = 1 if steps is None else len(launches) // steps
    for event in record.events[launches[first] : launches[-1]]:
        if isinstance(event, str):
            inside = event.startswith(f"{BEFORE} ")
        elif not inside and event.is_ours:
            found.append(event)
    return found


def _is_of_denoiser(event: Wait | str, kind: str) -> bool:
    return isinstance(event, str) and event.startswith(f"{kind} ") and event.split()[1].split(".")[0] in DENOISERS


def place(wait: Wait) -> str:
    """The file and the function of the innermost line of ours, without its number."""
    return re.sub(r":\d+", "", wait.ours)


@pytest.fixture
def replica(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], record: Record) -> Replica:
    found = Replica(checkpoint(request.param), device())
    found.batcher.runner.stages = [*found.batcher.runner.stages, Marking(record)]
    found.draw(found.request(0))  # what is kept by content is known from now on
    record.clear()
    return found


@pytest.mark.parametrize("replica", chosen("flux", nightly=["sd3", "zimage", "qwenimage", "sdxl"]), indirect=True)
def test_our_code_does_not_wait_between_the_forwards_of_merged_requests(replica: Replica, record: Record) -> None:
    replica.draw(*[replica.request(index, num_inference_steps=5) for index in range(1, 4)])
    inside = waits_of_steps(record)
    assert not inside, [(wait.kind, wait.ours, wait.library) for wait in inside]
    elsewhere = {place(wait) for wait in record.waits if wait.is_ours}
    assert elsewhere <= ONCE_A_REQUEST, {wait.ours: record.stacks[wait] for wait in record.waits if wait.is_ours}


@pytest.mark.parametrize("replica", chosen("flux", nightly=["qwenimage", "sd3"]), indirect=True)
@pytest.mark.parametrize("noise", ["cuda", "cpu"])
def test_a_rollout_does_not_wait_between_forwards(
    noise: Literal["cuda", "cpu"], replica: Replica, record: Record
) -> None:
    rollout = Rollout(returns_trajectory=True, returns_environment=True, generator_device=noise)
    replica.jobs.submit(replica.request(2, num_inference_steps=5, rollout=rollout))
    replica.settle()
    assert [type(message) for message in replica.sent] == [Result]
    inside = waits_of_steps(record, 5)  # the first step reads the schedule
    assert not inside, [(wait.kind, wait.ours, wait.library) for wait in inside]


@pytest.mark.parametrize("replica", ["flux"], indirect=True)
def test_a_preview_waits_only_where_its_own_call_of_the_pipeline_begins(replica: Replica, record: Record) -> None:
    replica.draw(replica.request(1, num_inference_steps=5, preview_every=2))
    in_threads = "worker/requests/encoding_threads.py _encode_preview"
    assert {place(wait) for wait in waits_of_steps(record)} <= ONCE_A_REQUEST | {in_threads}
