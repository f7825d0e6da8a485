"""Admission, dispatch, cancellation, deadlines and the accounting of what a worker still holds."""

import math
import sys
from types import FrameType
from typing import Any

import msgspec
import pytest

from safelight.protocol.codec import Buffer
from safelight.protocol.config import Config
from safelight.protocol.errors import Internal
from safelight.protocol.generation import (
    Cancel,
    Failed,
    Generate,
    GenerateCopies,
    Image,
    Preview,
    Progress,
    Queued,
    Result,
    Started,
)
from safelight.protocol.messages import FromWorker
from safelight.protocol.operations import AbortRequests
from safelight.protocol.replicas import ReplicaFailed, ReplicaLoading
from safelight.protocol.rollouts import Rollout, Tensor
from safelight.tests.scheduler.stage import Stage, generate, result, stopped

ONE_AT_A_TIME = Config(max_running=1)
TWO_REPLICAS = Config(replicas=2, max_running=4)


def test_a_free_worker_gets_a_request_at_once_and_without_a_turn() -> None:
    stage = Stage()
    stage.server(generate("a"))
    assert stage.sent(Queued) == [Queued("a", 0)]
    assert stage.sent(Started) == [Started("a", 0, 0.0)]
    assert stage.given(0) == ["a"]


def test_a_request_without_progress_costs_the_server_one_message() -> None:
    stage = Stage(config=ONE_AT_A_TIME)
    before = len(stage.to_server)
    stage.server(generate("a", progress=False), generate("waits", progress=False))
    assert stage.to_server[before:] == []
    stage.worker(0, result("a"), result("waits"))
    assert [message.request_id for message in stage.to_server[before:] if isinstance(message, Result)] == ["a", "waits"]
    assert stage.given(0) == ["a", "waits"]


def test_a_request_that_is_for_one_replica_goes_there_however_busy_it_is_and_fails_without_it() -> None:
    stage = Stage(ready=(0, 1), config=Config(replicas=3, max_running=2))
    stage.server(generate("a"))
    for name, number in (("b", 0), ("c", 1), ("d", 2), ("e", 0)):
        stage.server(pinned(name, number))
    assert stage.started() == [("a", 0), ("b", 0), ("c", 1)]
    assert stage.error("d") == "unavailable"
    stage.worker(0, result("a"))
    assert stage.started()[-1] == ("e", 0)
    stage.server(pinned("f", 0))
    stage.exited(0)
    assert stage.error("f") == "unavailable"


def pinned(name: str, *numbers: int, outputs: int = 1) -> GenerateCopies:
    return GenerateCopies(generate(name, outputs), list(numbers))


def test_a_request_that_waits_for_its_full_replica_does_not_hold_back_the_others() -> None:
    stage = Stage(ready=(0, 1), config=Config(replicas=2, max_running=2))
    stage.server(
        pinned("clips", 0, outputs=2), pinned("waits", 0), generate("free"), pinned("behind", 0), pinned("other", 1)
    )
    assert stage.started() == [("clips", 0), ("free", 1), ("other", 1)]
    stage.worker(0, result("clips"))
    assert stage.given(0) == ["clips", "waits", "behind"], "in their order"


def test_small_requests_do_not_starve_one_that_is_for_their_replica() -> None:
    stage = Stage(ready=(0, 1), config=Config(replicas=2, max_running=2))
    stage.server(pinned("runs", 0), pinned("large", 0, outputs=2), generate("a"), generate("b"), generate("c"))
    assert stage.started() == [("runs", 0), ("a", 1), ("b", 1)], "replica 0 has room for c, and large is before it"
    stage.worker(0, result("runs"))
    assert stage.given(0) == ["runs", "large"]
    stage.worker(1, result("a"))
    assert stage.given(1) == ["a", "b", "c"]


def test_a_request_for_any_replica_that_does_not_fit_holds_back_also_those_that_are_for_one() -> None:
    stage = Stage(ready=(0, 1), config=Config(replicas=2, max_running=2))
    stage.server(generate("a"), generate("b"), generate("large", 2), pinned("small", 1))
    assert stage.started() == [("a", 0), ("b", 1)]


def test_a_request_whose_replica_is_not_ready_fails_also_behind_one_that_waits() -> None:
    stage = Stage(ready=(0, 1), config=Config(replicas=2, max_running=1))
    stage.server(generate("a"), generate("b"), generate("waits"), pinned("c", 1))
    stage.exited(1)
    assert stage.error("c") == "unavailable"
    assert stage.started() == [("a", 0), ("b", 1)]


def test_the_work_for_a_message_does_not_grow_with_the_queue() -> None:
    assert _lines_of_a_heartbeat(waiting=300) == _lines_of_a_heartbeat(waiting=3)


def _lines_of_a_heartbeat(waiting: int) -> int:
    """The lines of Python that a heartbeat runs."""
    stage = Stage(config=Config(max_running=1, max_queue=1000))
    stage.server(generate("runs"), *(generate(str(number)) for number in range(waiting)))
    lines = 0

    def count(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        stage.heartbeat()
    finally:
        sys.settrace(before)
    return lines


def test_of_copies_for_several_replicas_all_are_accepted_or_none() -> None:
    stage = Stage(ready=(0, 1, 2), config=Config(replicas=3, max_running=1, max_queue=1))
    stage.server(pinned("runs", 1), pinned("runs too", 2), pinned("e", 0, 1, 2))
    assert len(stage.sent(Queued, "e")) == 3, "one place was free, which is enough for one request"
    stage.worker(0, result("e"))
    stage.server(pinned("f", 0, 1, 2))
    assert [failed.error.code for failed in stage.sent(Failed, "f")] == ["queue_full"] * 3
    assert [stage.given(number) for number in range(3)] == [["e"], ["runs"], ["runs too"]]
    stage.worker(1, result("runs"))
    stage.worker(2, result("runs too"))
    assert [stage.given(number)[-1] for number in range(3)] == ["e", "e", "e"]


def test_the_copies_of_a_request_wait_in_one_place_of_the_queue_like_its_outputs() -> None:
    stage = Stage(ready=(0, 1, 2), config=Config(replicas=3, max_running=1, max_queue=2))
    stage.server(pinned("runs", 0, 1, 2))
    stage.server(pinned("e", 0, 1, 2))
    assert stage.dispatcher.status(stage.now).queued == 1
    stage.server(generate("fits", 3), pinned("f", 0, 1, 2), generate("too many"))
    status = stage.dispatcher.status(stage.now)
    assert (status.queued, status.running) == (2, 1)
    assert {failed.request_id for failed in stage.sent(Failed)} == {"f", "too many"}


def test_a_copy_that_cannot_be_accepted_is_why_none_runs() -> None:
    stage = Stage(ready=(0, 1, 2), config=Config(replicas=3))
    stage.server(generate("e"), Cancel("e"))  # the worker still holds it
    stage.server(pinned("e", 1, 2))
    assert [failed.error.code for failed in stage.sent(Failed)] == ["client_gone", "invalid_request", "invalid_request"]
    assert stage.started() == [("e", 0)]


def test_a_cancel_ends_the_copies_that_have_no_answer_yet() -> None:
    stage = Stage(ready=(0, 1, 2), config=Config(replicas=3, max_running=1))
    stage.server(pinned("runs", 2), pinned("e", 0, 1, 2))
    stage.worker(0, result("e"))
    stage.server(Cancel("e"))
    assert [failed.error.code for failed in stage.sent(Failed, "e")] == ["client_gone"] * 2
    assert [stage.cancelled(number) for number in range(3)] == [[], ["e"], []]
    stage.worker(2, result("runs"))
    assert stage.given(2) == ["runs"]


def test_a_replica_that_is_lost_takes_its_own_copy_along_and_no_other() -> None:
    stage = Stage(ready=(0, 1), config=Config(replicas=2))
    stage.server(pinned("e", 0, 1))
    stage.exited(0)
    assert stage.error("e") == "unavailable"
    stage.worker(1, result("e"))
    assert stage.sent(Result, "e")


@pytest.mark.parametrize(("name", "exact"), [("mine.1f", True), ("mine", False)])
def test_an_abort_ends_the_copies_of_a_request_also_when_the_first_has_ended(name: str, exact: bool) -> None:
    stage = Stage(ready=(0, 1, 2), config=Config(replicas=3))
    stage.server(pinned("mine.1f", 0, 1, 2), pinned("other.2e", 0, 1, 2))
    stage.worker(0, result("mine.1f"))
    stage.server(AbortRequests("abort", name, exact=exact))
    assert [failed.request_id for failed in stage.sent(Failed)] == ["mine.1f"] * 2
    assert [stage.cancelled(number) for number in range(3)] == [[], ["mine.1f"], ["mine.1f"]]


def test_without_a_ready_replica_the_refusal_says_why_for_each() -> None:
    stage = Stage(ready=(), config=Config(replicas=4))
    stage.worker(0, ReplicaLoading(0, 10, "loading the transformer"))
    stage.worker(1, ReplicaFailed(1, "The directory /models/x does not exist."))
    stage.exited(2, "exit status 1")
    stage.server(generate("a"))
    (failed,) = stage.sent(Failed)
    assert (failed.error.status, stage.error("a")) == (503, "unavailable")
    assert failed.error.retry_after_s
    assert failed.error.retry_after_s >= 1
    for reason in (
        "replica 0 is starting: loading the transformer",
        "replica 1 is failed: The directory /models/x does not exist.",
        "replica 2 is lost: exit status 1",
        "replica 3 is starting",
    ):
        assert reason in failed.error.message
    assert not stage.sent(Queued)


def test_the_queue_is_bounded_and_a_place_that_becomes_free_is_given_away_again() -> None:
    stage = Stage(config=Config(max_running=1, max_queue=2))
    stage.server(generate("runs"), generate("b"), generate("c"), generate("too many"))
    assert stage.error("too many") == "queue_full"
    assert [queued.position for queued in stage.sent(Queued)] == [0, 0, 1]
    stage.worker(0, result("runs"))
    stage.server(generate("fits"))
    assert stage.sent(Queued, "fits") == [Queued("fits", 1)]


def test_images_of_waiting_requests_are_bounded_by_their_bytes() -> None:
    stage = Stage(config=Config(max_running=1, max_queue_mb=1))
    image = Image(1024, 1024, Buffer(bytes(3 * 2**20)))
    heavy = [msgspec.structs.replace(generate(name), images=[image]) for name in "abc"]
    stage.server(*heavy, generate("light"))
    assert [queued.request_id for queued in stage.sent(Queued)] == ["a", "b"], "one runs, and one waits"
    assert stage.error("c") == stage.error("light") == "queue_full"
    stage.worker(0, result("a"))
    stage.server(generate("later"))
    assert stage.sent(Queued, "later")


def test_retry_after_follows_how_long_requests_take_and_is_never_below_a_second() -> None:
    stage = Stage(config=Config(max_running=1, max_queue=1))
    stage.server(generate("a"), generate("b"), generate("refused before any has finished"))
    stage.wait(8.0)
    stage.worker(0, result("a"))
    stage.server(generate("c"), generate("refused after one of 8 s"))
    before, after = (failed.error.retry_after_s for failed in stage.sent(Failed))
    assert (before, after) == (1.0, 8.0)


def test_priority_decides_among_the_waiting_and_arrival_among_equals() -> None:
    stage = Stage(config=ONE_AT_A_TIME)
    stage.server(generate("runs"))
    for name, priority in (("a", 0), ("b", 0), ("urgent", 10), ("c", 0), ("later", -1)):
        stage.server(generate(name, priority=priority))
    for name in ("runs", "urgent", "a", "b", "c", "later"):
        stage.worker(0, result(name))
    assert stage.given(0) == ["runs", "urgent", "a", "b", "c", "later"]


def test_the_replica_with_the_fewest_outstanding_outputs_gets_the_next_request() -> None:
    stage = Stage(ready=(0, 1), config=TWO_REPLICAS)
    stage.server(generate("a", 3), generate("b", 1), generate("c", 1), generate("d", 1))
    assert stage.started() == [("a", 0), ("b", 1), ("c", 1), ("d", 1)]
    stage.worker(0, result("a"))
    stage.server(generate("e", 2))
    assert stage.started()[-1] == ("e", 0)


def test_a_replica_never_holds_more_outputs_than_its_cap() -> None:
    stage = Stage(config=Config(max_running=4))
    stage.server(generate("a", 2), generate("b", 2), generate("c", 1))
    assert stage.given(0) == ["a", "b"]
    assert stage.replica().outstanding == 4
    stage.worker(0, result("a"))
    assert stage.given(0) == ["a", "b", "c"]


def test_a_request_over_the_cap_runs_alone_when_the_replica_is_idle() -> None:
    stage = Stage(config=Config(max_running=4))
    stage.server(generate("small"), generate("large", 9), generate("next"))
    assert stage.given(0) == ["small"]
    stage.worker(0, result("small"))
    assert stage.given(0) == ["small", "large"]
    stage.worker(0, result("large"))
    assert stage.given(0) == ["small", "large", "next"]


def test_small_requests_that_came_later_do_not_starve_a_large_one() -> None:
    stage = Stage(config=Config(max_running=4))
    stage.server(generate("s0", 2), generate("s1", 2), generate("large", 4))
    for index in range(2, 20):
        stage.server(generate(f"s{index}", 2))
        if f"s{index - 2}" in stage.given(0):
            stage.worker(0, result(f"s{index - 2}"))
    assert stage.given(0)[:3] == ["s0", "s1", "large"]


def test_a_result_tells_the_time_in_the_queue_and_the_total_with_it() -> None:
    stage = Stage(config=ONE_AT_A_TIME)
    stage.server(generate("a"), generate("b"))
    stage.wait(2.5)
    stage.worker(0, result("a"))
    stage.wait(1.0)
    stage.worker(0, result("b", b"picture", total_s=0.75))
    (answer,) = stage.sent(Result, "b")
    assert (answer.timings.queue_s, answer.timings.total_s, answer.timings.denoise_s) == (2.5, 3.25, 0.5)
    assert bytes(answer.outputs[0].data) == b"picture"
    assert stage.sent(Started, "b") == [Started("b", 0, 2.5)]


def test_progress_previews_and_failures_reach_the_server_as_the_worker_sent_them() -> None:
    stage = Stage()
    stage.server(generate("a"))
    messages: list[FromWorker] = [
        Progress("a", 0, 1, 4),
        Preview("a", 0, 1, 4, Buffer(b"jpeg")),
        Failed("a", Internal("The forward failed.").info()),
    ]
    stage.worker(0, *messages)
    assert stage.to_server[-3:] == messages
    assert stage.replica().outstanding == 0


def test_a_waiting_request_that_is_cancelled_leaves_the_queue_and_never_runs() -> None:
    stage = Stage(config=ONE_AT_A_TIME)
    stage.server(generate("a"), generate("b"), generate("c"), Cancel("b"))
    assert stage.error("b") == "client_gone"
    stage.worker(0, result("a"))
    assert stage.given(0) == ["a", "c"]
    assert stage.cancelled(0) == []


def test_a_running_request_that_is_cancelled_is_answered_at_once_and_keeps_its_room_until_the_worker_is_done() -> None:
    stage = Stage(config=ONE_AT_A_TIME)
    stage.server(generate("a"), generate("b"), Cancel("a"))
    assert stage.error("a") == "client_gone"
    assert stage.cancelled(0) == ["a"]
    assert (stage.given(0), stage.replica().outstanding) == (["a"], 1)
    stage.worker(0, stopped("a"))
    assert stage.given(0) == ["a", "b"]
    assert stage.error("a") == "client_gone"


def test_a_result_that_crossed_a_cancel_is_dropped_and_makes_room() -> None:
    stage = Stage(config=ONE_AT_A_TIME)
    stage.server(generate("a"), generate("b"), Cancel("a"))
    stage.worker(0, Progress("a", 0, 1, 4), result("a"))
    assert stage.error("a") == "client_gone"
    assert not stage.sent(Progress)
    assert stage.given(0) == ["a", "b"]
    assert stage.replica().outstanding == 1


def test_cancelling_what_is_unknown_or_done_does_nothing() -> None:
    stage = Stage()
    stage.server(generate("a"))
    stage.worker(0, result("a"))
    before = len(stage.to_server)
    stage.server(Cancel("a"), Cancel(""), Cancel("never seen"))
    assert len(stage.to_server) == before
    assert stage.cancelled(0) == []


def test_a_worker_that_answers_twice_does_not_make_room_twice() -> None:
    stage = Stage(config=Config(max_running=2))
    stage.server(generate("a"), generate("b"))
    stage.worker(0, result("a"), stopped("a"), result("a"))
    assert stage.replica().outstanding == 1
    assert len(stage.sent(Result, "a")) == 1


def test_a_deadline_that_passes_in_the_queue_ends_the_request_there() -> None:
    stage = Stage(config=ONE_AT_A_TIME)
    stage.server(generate("a"), generate("b", timeout_s=5.0), generate("c"))
    assert stage.dispatcher.next_turn() <= stage.now + 5.0
    stage.wait(4.9)
    assert not stage.sent(Failed)
    stage.wait(0.2)
    (failed,) = stage.sent(Failed, "b")
    assert (failed.error.code, failed.error.status) == ("deadline_passed", 504)
    assert "5 s" in failed.error.message
    stage.worker(0, result("a"))
    assert stage.given(0) == ["a", "c"]


def test_a_deadline_that_passes_while_running_stops_the_worker_and_drops_its_late_answer() -> None:
    stage = Stage(config=ONE_AT_A_TIME)
    stage.server(generate("a", timeout_s=5.0), generate("b"))
    stage.wait(5.0)
    assert stage.error("a") == "deadline_passed"
    assert stage.cancelled(0) == ["a"]
    assert stage.given(0) == ["a"]
    stage.worker(0, result("a"))
    assert stage.error("a") == "deadline_passed"
    assert stage.given(0) == ["a", "b"]


def test_the_deadline_counts_from_arrival_not_from_the_start() -> None:
    stage = Stage(config=ONE_AT_A_TIME)
    stage.server(generate("a"), generate("b", timeout_s=5.0))
    stage.wait(3.0)
    stage.worker(0, result("a"))
    stage.wait(2.0)
    assert stage.error("b") == "deadline_passed"
    (failed,) = stage.sent(Failed, "b")
    assert "3.0 s of waiting" in failed.error.message


def test_a_request_whose_time_is_over_is_not_given_to_a_worker_that_becomes_free() -> None:
    stage = Stage(config=ONE_AT_A_TIME)
    stage.server(generate("a"), generate("b", timeout_s=5.0))
    stage.now += 6.0  # no turn in between: the worker's answer is read first
    stage.worker(0, result("a"))
    assert stage.error("b") == "deadline_passed"
    assert stage.given(0) == ["a"]


def test_the_configured_timeout_holds_for_requests_without_their_own() -> None:
    stage = Stage(config=Config(request_timeout_s=7.0))
    stage.server(generate("a"), generate("patient", timeout_s=math.inf))
    stage.wait(7.0)
    assert stage.error("a") == "deadline_passed"
    stage.wait(1e9)
    assert not stage.sent(Failed, "patient")


def test_finished_requests_leave_no_deadline_behind() -> None:
    stage = Stage()
    stage.server(generate("a", timeout_s=5.0))
    stage.worker(0, result("a"))
    stage.wait(10.0)
    assert not stage.sent(Failed)
    assert stage.dispatcher.next_turn() > stage.now


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, math.nan])
def test_a_timeout_that_is_not_a_number_is_refused_by_name(timeout_s: float) -> None:
    stage = Stage()
    stage.server(generate("a", timeout_s=timeout_s))
    (failed,) = stage.sent(Failed)
    assert (failed.error.code, failed.error.field) == ("invalid_request", "timeout_s")


def test_a_request_for_nothing_is_refused() -> None:
    stage = Stage()
    stage.server(Generate(request_id="a", samples=[]))
    assert stage.error("a") == "invalid_request"
    assert stage.given(0) == []


def test_an_id_in_use_is_refused_while_it_waits_runs_or_is_being_stopped() -> None:
    stage = Stage(config=ONE_AT_A_TIME)
    stage.server(generate("a"), generate("b"), generate("a"), generate("b"))
    assert [failed.error.code for failed in stage.sent(Failed)] == ["invalid_request"] * 2
    stage.server(Cancel("a"), generate("a"))  # the worker still holds the first
    codes = [failed.error.code for failed in stage.sent(Failed, "a")]
    assert codes == ["invalid_request", "client_gone", "invalid_request"]
    stage.worker(0, stopped("a"), result("b"))
    stage.server(generate("a"))
    assert stage.given(0) == ["a", "b", "a"]


def test_status_counts_the_waiting_and_the_running() -> None:
    stage = Stage(config=Config(max_running=2))
    stage.server(generate("a"), generate("b"), generate("c"), Cancel("a"))
    status = stage.dispatcher.status(stage.now)
    assert (status.queued, status.running, status.replicas[0].outstanding) == (1, 1, 2)


def test_noise_that_rollouts_bring_along_counts_in_the_queue_like_images() -> None:
    stage = Stage(config=Config(max_queue_mb=1, max_running=1))
    stage.server(generate("runs"))
    noise = Tensor("torch.float32", [150_000], Buffer(bytes(600_000)))
    rollout = Rollout(initial_noise=[noise])
    for number in range(3):
        stage.server(msgspec.structs.replace(generate(str(number)), rollout=rollout))
    assert stage.error("1") == stage.error("2") == "queue_full"
    assert 600_000 < stage.dispatcher.status(stage.now).queued_bytes < 601_000
