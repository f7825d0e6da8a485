"""The barrier queue: what came before an operation ends, is aborted or goes on, and what came after it waits."""

import pytest

from safelight.protocol.config import Config
from safelight.protocol.generation import Cancel, Queued
from safelight.protocol.operations import AbortRequests, Barrier, Begin, Digests, Operation
from safelight.tests.scheduler.operating import Operating, update
from safelight.tests.scheduler.stage import generate, result


def test_operations_are_done_in_the_order_in_which_they_came() -> None:
    stage = Operating()
    for name in "abc":
        stage.operate(name, update(name))
    stage.do_all()
    first_steps = [order.operation for to, order in stage.ordered if to == 1 and order.operation is not None]
    assert first_steps == [update(name) for name in "abc"]
    assert [stage.done(name).weight_version for name in "abc"] == ["1", "2", "3"]


def test_waiting_lets_all_that_came_before_end_and_none_that_came_after_begin() -> None:
    stage = Operating(replicas=1, config=Config(max_running=1))
    stage.server(generate("runs"), generate("waits"))
    stage.operate("u", update(), "wait")
    stage.server(generate("after"))
    assert stage.ordered == []
    stage.worker(0, result("runs"))
    assert (stage.given(0), stage.ordered) == (["runs", "waits"], [])
    stage.worker(0, result("waits"))
    assert stage.steps(0) == ["prepare"]
    stage.do_all()
    assert stage.given(0) == ["runs", "waits", "after"]
    stage.done("u")


def test_aborting_ends_earlier_requests_and_waits_until_the_workers_have_dropped_them() -> None:
    stage = Operating(replicas=1, config=Config(max_running=1))
    stage.server(generate("runs"), generate("waits"))
    stage.operate("u", update(), "abort")
    stage.server(generate("after"))
    assert (stage.error("runs"), stage.error("waits")) == ("conflict", "conflict")
    assert (stage.cancelled(0), stage.ordered) == (["runs"], [])
    stage.worker(0, result("runs"))
    stage.do_all()
    assert stage.given(0) == ["runs", "after"]
    stage.worker(0, result("after"))
    assert stage.sent(type(result("after")), "after")


def test_in_place_waits_for_nobody_and_starts_nobody_while_it_is_done() -> None:
    stage = Operating(replicas=1, config=Config(max_running=1))
    stage.server(generate("runs"), generate("waits"))
    stage.operate("u", update(), "in_place")
    assert stage.steps(0) == ["prepare"]
    stage.worker(0, result("runs"))
    assert stage.given(0) == ["runs"], "weights are being changed"
    stage.do_all()
    assert stage.given(0) == ["runs", "waits"]


@pytest.mark.parametrize("barrier", ["wait", "abort", "in_place"])
def test_requests_and_operations_keep_their_order(barrier: Barrier) -> None:
    stage = Operating(replicas=1)
    stage.server(generate("before"))
    stage.operate("first", update(), barrier)
    stage.server(generate("between"))
    stage.operate("second", update(), barrier)
    stage.server(generate("after"))
    stage.worker(0, result("before"))
    stage.up_to("commit")
    assert stage.given(0) == ["before"]
    stage.do(0)
    if barrier == "wait":
        assert stage.given(0) == ["before", "between"], "it came before the second"
        stage.worker(0, result("between"))
    stage.do_all()
    stage.done("second")
    if barrier == "abort":
        assert stage.error("between") == "conflict"
    assert stage.given(0)[-1] == "after"


def test_requests_behind_an_operation_count_as_queued_and_towards_the_bound() -> None:
    stage = Operating(replicas=1, config=Config(max_running=1, max_queue=3))
    stage.server(generate("runs"), generate("waits"))
    stage.operate("u", update(), "wait")
    stage.server(generate("held"), generate("held too"), generate("too many"))
    assert [queued.position for queued in stage.sent(Queued)] == [0, 0, 1, 2]
    assert stage.error("too many") == "queue_full"
    status = stage.dispatcher.status(stage.now)
    assert (status.queued, status.running) == (3, 1)


def test_a_request_behind_an_operation_keeps_its_deadline_and_may_be_taken_back() -> None:
    stage = Operating(replicas=1)
    stage.operate("u", update())
    stage.server(
        generate("late", timeout_s=5.0),
        generate("gone"),
        generate("stays"),
        generate("ended.1"),
        generate("other.1"),
        generate("this.2"),
    )
    assert stage.dispatcher.next_turn() <= stage.now + 5.0
    stage.wait(5.0)
    stage.server(Cancel("gone"), AbortRequests("abort", "ended"), AbortRequests("abort", "other", exact=True))
    stage.server(AbortRequests("abort", "this.2", exact=True))
    assert stage.error("this.2") == "conflict"
    assert (stage.error("late"), stage.error("gone"), stage.error("ended.1")) == (
        "deadline_passed", "client_gone", "conflict",
    )  # fmt: skip
    stage.do_all()
    assert stage.given(0) == ["stays", "other.1"], "which nobody ends who only guesses its client's name for it"


def test_requests_behind_an_operation_do_not_wait_for_a_restart() -> None:
    stage = Operating(replicas=1)
    stage.operate("u", update())
    stage.server(generate("held"))
    stage.kill(0)
    assert stage.error("held") == "unavailable"
    assert "lost" in stage.refusal("u")


def test_an_operation_whose_client_goes_away_in_the_queue_is_not_done() -> None:
    stage = Operating(replicas=1)
    stage.operate("first", update("first"))
    stage.operate("second", update("second"))
    stage.server(generate("behind"), Cancel("second"))
    stage.do_all()
    assert stage.weights() == {0: "first"}
    assert stage.given(0) == ["behind"]


def test_an_operation_that_has_begun_ends_though_its_client_goes_away() -> None:
    stage = Operating()
    stage.operate("u", update())
    stage.server(Cancel("u"))
    stage.do_all()
    assert stage.weights() == {0: "new", 1: "new"}
    assert stage.done("u").weight_version == "1"


@pytest.mark.parametrize("operation", [update(), Begin(update_id="u", timeout_s=300.0)], ids=["update", "begin"])
def test_an_operation_whose_client_goes_away_while_it_waits_for_requests_to_end_is_not_done(
    operation: Operation,
) -> None:
    stage = Operating(replicas=1)
    stage.server(generate("runs"))
    stage.operate("gone", operation, "wait")
    stage.server(generate("behind"))
    stage.server(Cancel("gone"))
    assert stage.given(0) == ["runs", "behind"], "there is nothing to wait for"
    assert stage.ordered == []
    stage.operate("next", Digests())
    stage.do_all()
    stage.done("next")


def test_a_part_whose_client_goes_away_before_its_turn_is_not_written() -> None:
    stage = Operating()
    stage.begin()
    stage.operate("first", update("first", part_of="u"))
    stage.operate("gone", update("gone", part_of="u"))
    stage.server(Cancel("gone"), Cancel("first"))
    stage.do_all()
    stage.commit()
    assert stage.weights() == {0: "first", 1: "first"}
