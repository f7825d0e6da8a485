"""One operation after the other, in their order among requests: the steps, the answer, and who waits for it."""

import pytest

from safelight.protocol.config import Config
from safelight.protocol.errors import Conflict, Internal
from safelight.protocol.messages import Cancel, Queued
from safelight.protocol.operations import (
    Abort,
    AbortRequests,
    Barrier,
    Begin,
    Commit,
    Continue,
    Digests,
    Files,
    Flush,
    Operate,
    Operation,
    Pause,
    SetPaused,
    Sleep,
    Update,
    Wake,
)
from safelight.tests.scheduler.operating import REFUSED, TWO, Operating, update
from safelight.tests.scheduler.stage import generate, result

JOURNAL = Config(replicas=2, weights_journal="/journal")


def test_no_replica_goes_a_step_further_before_all_have_done_the_one_before() -> None:
    stage = Operating()
    stage.operate("u", update(version="named"))
    for step in ("prepare", "write", "commit"):
        assert [order.step for _, order in stage.told[-2:]] == [step, step]
        stage.do(1)
        assert stage.unanswered("u")
        assert stage.steps(1)[-1] == step, "it waits for the other"
        stage.do(0)
    assert [stage.steps(number) for number in (0, 1)] == [["prepare", "write", "commit"]] * 2
    assert stage.done("u").weight_version == "named"
    assert sorted(stage.done("u").reports) == [0, 1]
    assert stage.replica(0).model == stage.replica(1).model
    assert stage.weights() == {0: "new", 1: "new"}


def test_the_operation_comes_with_the_first_step_and_the_version_with_those_that_keep_it() -> None:
    stage = Operating(config=JOURNAL)
    stage.operate("u", update())
    stage.do_all()
    orders = [order for to, order in stage.told if to == 0]
    assert [(order.step, order.operation is not None, order.weight_version) for order in orders] == [
        ("prepare", True, None), ("write", False, None), ("journal", False, "1"), ("commit", False, "1"),
    ]  # fmt: skip
    assert len({order.number for order in orders}) == 1


def test_what_is_to_be_done_once_is_never_done_twice_or_by_nobody() -> None:
    stage = Operating(replicas=3, config=Config(replicas=3, weights_journal="/journal"))
    stage.begin()
    operations: list[Operation] = [update(part_of="u"), Commit("u"), Digests(), Flush(), update(), Sleep(["caches"])]
    for number, operation in enumerate(operations):
        stage.operate(f"{number}", operation)
        stage.do_all()
        stage.done(f"{number}")
    told: dict[tuple[int, str], list[bool]] = {}
    for _, order in stage.told:
        told.setdefault((order.number, order.step), []).append(order.leads)
    assert len(told) == 2 + 2 + 1 + 1 + 4 + 1
    assert all(leads.count(True) == 1 for leads in told.values())
    assert all(len(leads) == (1 if step == "journal" else 3) for (_, step), leads in told.items())


@pytest.mark.parametrize("refuses", [0, 1])
def test_a_refused_part_is_let_go_of_everywhere_and_the_answer_says_what_was_wrong(refuses: int) -> None:
    stage = Operating()
    stage.operate("u", update())
    stage.do(refuses, REFUSED)
    stage.do(1 - refuses)
    assert [stage.steps(number) for number in (0, 1)] == [["prepare", "release"]] * 2
    assert stage.refusal("u") == REFUSED.message
    stage.do_all()
    assert not any(process.open for process in stage.processes.values())
    stage.operate("again", update(version="again"))
    stage.do_all()
    assert stage.done("again").weight_version == "again"


@pytest.mark.parametrize("step", ["write", "journal"])
def test_a_step_that_fails_after_the_write_is_undone_everywhere(step: str) -> None:
    stage = Operating(config=JOURNAL)
    stage.operate("u", update())
    stage.up_to(step)
    stage.do(0, Internal("The journal could not be written: No space left on device."))
    stage.do_all()
    assert [stage.steps(number)[-1] for number in (0, 1)] == ["rollback", "rollback"]
    assert "journal" in stage.refusal("u")
    assert stage.weights() == {0: "checkpoint", 1: "checkpoint"}
    assert stage.replica().model is not None
    stage.operate("d", Digests())
    stage.do_all()
    assert stage.done("d").weight_version == "0"


def test_the_answer_to_two_refusals_is_the_one_of_the_first_replica() -> None:
    stage = Operating()
    stage.operate("u", update())
    stage.do(1, Internal("the second's"))
    stage.do(0, REFUSED)
    assert stage.refusal("u") == REFUSED.message


def test_an_update_without_a_tensor_makes_no_version() -> None:
    stage = Operating()
    stage.operate("u", Update(source=Files({}), weight_version="made up"))
    stage.do_all()
    assert stage.done("u").weight_version == "0"
    assert stage.steps(0) == ["prepare", "write"]


def test_versions_count_on_from_numbers_and_from_the_commits_after_names() -> None:
    stage = Operating()
    given = [None, None, "41", None, "a name", None, None]
    for number, version in enumerate(given):
        stage.operate(f"{number}", update(version=version))
        stage.do_all()
    found = [stage.done(f"{number}").weight_version for number in range(len(given))]
    assert found == ["1", "2", "41", "42", "a name", "6", "7"]


def test_operations_are_done_in_the_order_in_which_they_came() -> None:
    stage = Operating()
    for name in "abc":
        stage.operate(name, update(name))
    stage.do_all()
    first_steps = [order.operation for to, order in stage.told if to == 1 and order.operation is not None]
    assert first_steps == [update(name) for name in "abc"]
    assert [stage.done(name).weight_version for name in "abc"] == ["1", "2", "3"]


def test_waiting_lets_all_that_came_before_end_and_none_that_came_after_begin() -> None:
    stage = Operating(replicas=1, config=Config(max_running=1))
    stage.server(generate("runs"), generate("waits"))
    stage.operate("u", update(), "wait")
    stage.server(generate("after"))
    assert stage.told == []
    stage.worker(0, result("runs"))
    assert (stage.given(0), stage.told) == (["runs", "waits"], [])
    stage.worker(0, result("waits"))
    assert stage.steps(0) == ["prepare"]
    stage.do_all()
    assert stage.given(0) == ["runs", "waits", "after"]
    stage.done("u")


def test_aborting_ends_what_came_before_and_waits_until_the_workers_have_let_go_of_it() -> None:
    stage = Operating(replicas=1, config=Config(max_running=1))
    stage.server(generate("runs"), generate("waits"))
    stage.operate("u", update(), "abort")
    stage.server(generate("after"))
    assert (stage.error("runs"), stage.error("waits")) == ("conflict", "conflict")
    assert (stage.cancelled(0), stage.told) == (["runs"], [])
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


def test_held_requests_count_as_queued_and_towards_the_bound() -> None:
    stage = Operating(replicas=1, config=Config(max_running=1, max_queue=3))
    stage.server(generate("runs"), generate("waits"))
    stage.operate("u", update(), "wait")
    stage.server(generate("held"), generate("held too"), generate("too many"))
    assert [queued.position for queued in stage.sent(Queued)] == [0, 0, 1, 2]
    assert stage.error("too many") == "queue_full"
    status = stage.dispatcher.status()
    assert (status.queued, status.running) == (3, 1)


def test_a_held_request_keeps_its_deadline_and_may_be_taken_back() -> None:
    stage = Operating(replicas=1)
    stage.operate("u", update())
    stage.server(generate("late", timeout_s=5.0), generate("gone"), generate("stays"), generate("ended.1"))
    assert stage.dispatcher.next_turn() <= stage.now + 5.0
    stage.wait(5.0)
    stage.server(Cancel("gone"), AbortRequests("abort", "ended"))
    assert (stage.error("late"), stage.error("gone"), stage.error("ended.1")) == (
        "deadline_passed", "client_gone", "conflict",
    )  # fmt: skip
    stage.do_all()
    assert stage.given(0) == ["stays"]


def test_held_requests_do_not_wait_for_a_restart() -> None:
    stage = Operating(replicas=1)
    stage.operate("u", update())
    stage.server(generate("held"))
    stage.kill(0)
    assert stage.error("held") == "unavailable"
    assert "lost" in stage.refusal("u")


def test_an_operation_without_a_replica_is_refused_with_the_reasons() -> None:
    stage = Operating(ready=0, config=TWO)
    stage.operate("d", Digests())
    assert "replica 0 is starting" in stage.refusal("d")
    stage.operate("b", Begin(update_id="b"))
    assert "No replica is ready" in stage.refusal("b")
    stage.start(0)
    stage.operate("after", Digests())
    stage.do_all()
    stage.done("after")


def test_an_operation_whose_client_goes_away_in_the_line_is_not_done() -> None:
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


def test_answers_to_steps_that_are_over_change_nothing() -> None:
    stage = Operating()
    stage.operate("u", update())
    first = stage.processes[0].orders[0]
    stage.do(0)
    stage.do(1)
    stage.worker(0, stage.processes[0].perform(first))
    stage.worker(1, stage.processes[1].perform(first))
    assert stage.steps(0) == ["prepare", "write"]


def test_while_asleep_nothing_is_accepted_and_what_was_held_is_told() -> None:
    stage = Operating()
    stage.server(generate("runs"))
    stage.operate("sleep", Sleep(["weights"]), "wait")
    stage.server(generate("held"))
    stage.worker(0, result("runs"))
    stage.do_all()
    stage.done("sleep")
    stage.server(generate("refused"))
    assert (stage.error("held"), stage.error("refused")) == ("conflict", "conflict")
    assert stage.dispatcher.status().halted == "asleep"
    stage.operate("wake", Wake(["weights", "caches"]))
    stage.do_all()
    stage.server(generate("accepted"))
    assert stage.started()[-1][0] == "accepted"
    assert stage.dispatcher.status().halted is None


def test_a_part_of_an_update_that_never_was_is_refused() -> None:
    stage = Operating()
    for name, operation in {"u": update(part_of="x"), "c": Commit("x"), "a": Abort("x")}.items():
        stage.server(Operate(name, operation))
        assert "'x'" in stage.refusal(name)
    assert stage.told == []


@pytest.mark.parametrize("how", ["refused", "lost"])
def test_a_sleep_that_one_could_not_do_leaves_none_asleep(how: str) -> None:
    stage = Operating()
    stage.operate("sleep", Sleep(["weights"]))
    stage.do(0)
    if how == "lost":
        stage.kill(1)
    else:
        stage.do(1, Conflict("The weights cannot be put away: No space left on device."))
    stage.server(generate("served"))
    assert stage.refusal("sleep")
    stage.do_all()
    assert stage.processes[0].asleep == set()
    assert [to for to, order in stage.told if isinstance(order.operation, Wake)][:1] == [0]
    assert stage.started() == [("served", 0)]


def test_a_deeper_sleep_that_fails_leaves_the_sleep_that_was() -> None:
    stage = Operating()
    stage.operate("sleep", Sleep(["caches"]))
    stage.do_all()
    stage.operate("deeper", Sleep(["caches", "weights"]))
    stage.do(0)
    stage.do(1, Conflict("The weights cannot be put away."))
    stage.do_all()
    assert stage.processes[0].asleep == stage.processes[1].asleep == {"caches"}


def paused(stage: Operating, number: int) -> bool | None:
    """What a replica was told last."""
    told = [order.paused for to, order in stage.to_replicas if to == number and isinstance(order, SetPaused)]
    return told[-1] if told else None


@pytest.mark.parametrize("mode", ["wait", "abort"])
def test_a_pause_of_another_kind_does_not_leave_what_runs_stopped_for_ever(mode: Barrier) -> None:
    stage = Operating(replicas=1)
    stage.server(generate("runs"), Pause("first", "in_place"), Pause("second", mode))
    assert paused(stage, 0) is False, "it is to end, which takes forwards"
    assert stage.unanswered("second")
    stage.worker(0, result("runs"))
    stage.done("second")
    stage.server(generate("held"), Continue("continue"))
    assert paused(stage, 0) is False
    assert stage.started()[-1] == ("held", 0)


def test_who_comes_during_a_pause_goes_on_with_the_others() -> None:
    stage = Operating()
    stage.operate("u", update())
    stage.do_all()
    stage.server(Pause("pause", "in_place"))
    stage.kill(1)
    stage.start(1)
    assert paused(stage, 1) is True
    stage.server(Continue("continue"))
    stage.do_all()
    assert (paused(stage, 0), paused(stage, 1)) == (False, False)
    assert stage.serving() == [0, 1]


@pytest.mark.parametrize("operation", [update(), Begin(update_id="u", timeout_s=300.0)], ids=["update", "begin"])
def test_an_operation_whose_client_goes_away_while_it_waits_for_requests_to_end_is_not_done(
    operation: Operation,
) -> None:
    stage = Operating(replicas=1)
    stage.server(generate("runs"))
    stage.operate("gone", operation, "wait")
    stage.server(generate("behind"))
    stage.server(Cancel("gone"))
    assert stage.given(0) == ["runs", "behind"], "nothing is to be waited for"
    assert stage.told == []
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


def test_what_waited_through_a_pause_is_not_drawn_by_replicas_that_were_put_to_sleep_in_it() -> None:
    stage = Operating(replicas=1)
    stage.server(Pause("pause"), generate("waits"))
    stage.operate("sleep", Sleep(["weights"]), "wait")
    stage.do_all()
    stage.server(Continue("continue"))
    assert stage.given(0) == []
    stage.operate("u", update(), "wait")
    stage.do_all()
    assert stage.done("u"), "what may not start is not waited for"
    stage.operate("wake", Wake(["weights"]))
    stage.do_all()
    assert stage.given(0) == ["waits"]
