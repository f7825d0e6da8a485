"""Outputs share a forward as long as the device gains by it, and no forward makes everybody wait for nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import msgspec
import orjson
import pytest
import torch

from safelight.protocol.replicas import MergeLimit
from safelight.worker.crossing.call import Call, cross
from safelight.worker.crossing.coroutine import Coroutine
from safelight.worker.forward import stopwatch
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.gains import RETRY_FORWARDS, SAMPLES, Gains
from safelight.worker.forward.policy import MAX_KINDS, MergePolicy
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.forward.timing import Timing

KIND = ("transformer", 4096)
Seconds = Callable[[int], float]
"""The seconds of a forward by its calls."""


def busy_with_one(calls: int) -> float:
    return 0.125 * calls


def busy_with_four(calls: int) -> float:
    return 0.5 * max(1.0, calls / 4)


def with_overhead(calls: int) -> float:
    return 0.15 + 0.1 * calls


def short(calls: int) -> float:
    return 0.005 * calls


def limit_after(gains: Gains, seconds: Seconds, forwards: int = 60, calls_per_output: int = 1) -> int:
    """The limit after so many forwards of as many outputs as it allows."""
    found = 1
    for _ in range(forwards):
        gains.add(KIND, found, found * calls_per_output, seconds(found * calls_per_output))
        (found,) = [limit.outputs for limit in gains.limits() if (limit.name, limit.positions) == KIND]
    return found


@pytest.mark.parametrize(
    ("seconds", "expected"), [(busy_with_one, 1), (busy_with_four, 4), (with_overhead, 8), (short, 16)]
)
def test_the_limit_is_where_seconds_per_call_no_longer_fall(seconds: Seconds, expected: int) -> None:
    assert limit_after(Gains(16, 0.1), seconds) == expected


def test_the_share_that_must_be_gained_is_the_operator_s() -> None:
    assert limit_after(Gains(16, 0.25), with_overhead) == 2
    assert limit_after(Gains(16, 0.01), with_overhead) == 16


def test_a_limit_that_is_not_a_power_of_two_is_reached() -> None:
    gains = Gains(12, 0.1)
    assert gains.sizes == [1, 2, 4, 8, 12]
    assert limit_after(gains, short) == 12
    assert limit_after(Gains(1, 0.1), busy_with_one) == 1


def test_a_device_that_gains_nothing_tries_a_larger_forward_a_few_times_and_then_seldom() -> None:
    gains, sizes, found = Gains(16, 0.1), list[int](), 1
    for _ in range(RETRY_FORWARDS + 4 * SAMPLES):
        sizes.append(found)
        gains.add(KIND, found, found, busy_with_one(found))
        (found,) = [limit.outputs for limit in gains.limits()]
    assert sizes.count(2) == 2 * SAMPLES, "as often again, after many forwards"
    assert max(sizes) == 2


def test_measurements_while_the_machine_was_busy_with_something_else_do_not_decide_for_ever() -> None:
    gains = Gains(16, 0.1)
    assert limit_after(gains, lambda calls: 0.3 if calls == 1 else 0.4 * calls) == 1
    assert limit_after(gains, with_overhead, forwards=4 * RETRY_FORWARDS) == 8


def test_single_slow_forwards_do_not_stop_the_growth() -> None:
    gains, slow = Gains(16, 0.1), iter([1, 1, 5, 1, 5, 5, 1] * 100)
    assert limit_after(gains, lambda calls: with_overhead(calls) * next(slow)) >= 8


def test_two_calls_of_each_output_are_one_output() -> None:
    assert limit_after(Gains(16, 0.1), busy_with_one, calls_per_output=2) == 1
    assert limit_after(Gains(16, 0.1), short, calls_per_output=2) == 8, "which take 80 ms"


def test_only_changes_are_sent_to_other_ranks() -> None:
    gains = Gains(16, 0.1)
    limit_after(gains, with_overhead)
    assert [(one.name, one.positions, one.outputs) for one in gains.changed()] == [(*KIND, 8)]
    limit_after(gains, with_overhead, forwards=1)
    assert gains.changed() == []


def test_kinds_beyond_a_bound_are_forgotten_and_learnt_again() -> None:
    gains = Gains(16, 0.1)
    limit_after(gains, with_overhead)
    for positions in range(1000):
        gains.add(("vae.decode", positions), 1, 1, 0.001)
    assert len(gains.limits()) == 256
    gains.changed()
    gains.add(KIND, 1, 1, with_overhead(1))
    assert [one.outputs for one in gains.changed()] == [2]


def test_a_kind_in_use_keeps_its_limit_however_many_others_come_and_go() -> None:
    """A limit is sent when it changes, and never again: a rank that forgot it would run the kind alone for good."""
    gains, policy = Gains(16, 0.1), MergePolicy(16, 10**6)
    policy.measured = True
    assert limit_after(gains, short) == 16
    policy.limit(gains.changed())
    for positions in range(MAX_KINDS):
        policy.limit([MergeLimit("vae.decode", positions, 2, {})])
        assert policy.max_outputs(KIND) == 16
    assert policy.max_outputs(("vae.decode", MAX_KINDS - 1)) == 2
    assert policy.max_outputs(("vae.decode", 0)) == 1, "it was used least recently"


def test_limits_can_be_shown_as_json() -> None:
    gains = Gains(16, 0.1)
    limit_after(gains, short, forwards=2)
    (limit,) = orjson.loads(orjson.dumps([msgspec.to_builtins(one) for one in gains.limits()]))
    assert limit == {"name": KIND[0], "positions": KIND[1], "outputs": 16, "seconds": {"1": 0.005, "16": 0.005}}


def test_ranks_that_measure_nothing_run_the_leader_s_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank measures other times; only what the leader sends with a step may decide its forwards."""
    now = 0.0
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: now))

    def denoiser(x: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += with_overhead(len(x))
        return x * 2

    def body() -> None:
        for _ in range(20):
            cross(Call("transformer", "__call__", denoiser, (torch.ones(1, 4, 2),), {}))

    timing = Timing(torch.device("cpu"), 4, 0.1)
    leader, follower = (
        Batcher(max_batch=4, max_tokens=10**6, resources=ForwardResources(timing=one)) for one in (timing, None)
    )  # fmt: skip
    for batcher in (leader, follower):
        batcher.policy.measured = True
        for _ in range(4):
            batcher.start(Coroutine(body, lambda _: None))
    digests = set[int]()
    while leader.busy:
        limits = timing.changed_limits()
        for batcher in (leader, follower):
            batcher.policy.limit(limits)
            batcher.step()
        assert leader.schedule_digest == follower.schedule_digest
        digests.add(leader.schedule_digest)
    assert not follower.busy
    assert len(digests) < 4 * 20, "their calls met"
    assert {one.name: one.outputs for one in timing.merge_limits()} == {"transformer": 4}
