"""Sleep and pause: what is not started meanwhile, and that all go on together."""

import pytest

from safelight.protocol.errors import Unavailable
from safelight.protocol.operations import Barrier, Continue, Pause, SetPaused, Sleep, Wake
from safelight.tests.scheduler.operating import Operating, update
from safelight.tests.scheduler.stage import generate, result


def test_while_asleep_nothing_is_accepted_and_requests_behind_operations_are_reported() -> None:
    stage = Operating()
    stage.server(generate("runs"))
    stage.operate("sleep", Sleep(["transformer", "vae"]), "wait")
    stage.server(generate("held"))
    stage.worker(0, result("runs"))
    stage.do_all()
    stage.done("sleep")
    stage.server(generate("refused"))
    assert (stage.error("held"), stage.error("refused")) == ("conflict", "conflict")
    assert stage.dispatcher.status(stage.now).halted == "asleep"
    stage.operate("wake", Wake(["transformer", "vae", "caches"]))
    stage.do_all()
    stage.server(generate("accepted"))
    assert stage.started()[-1][0] == "accepted"
    assert stage.dispatcher.status(stage.now).halted is None


@pytest.mark.parametrize("how", ["refused", "lost"])
def test_a_sleep_that_one_could_not_do_leaves_none_asleep(how: str) -> None:
    stage = Operating()
    stage.operate("sleep", Sleep(["transformer", "vae"]))
    stage.do(0)
    if how == "lost":
        stage.kill(1)
    else:
        stage.do(1, Unavailable("Sleeping needs 2 MB of /tmp, and 1 MB are free: 1 MB are missing."))
    stage.server(generate("served"))
    assert stage.unanswered("sleep")
    assert stage.started() == [], "the others are not awake again yet"
    stage.do_all()
    assert stage.refusal("sleep")
    assert stage.processes[0].asleep == set()
    assert [to for to, order in stage.ordered if isinstance(order.operation, Wake)][:1] == [0]
    assert stage.started() == [("served", 0)]


NO_ROOM_TO_WAKE = Unavailable("Waking needs 2 MB of cuda:0, and 1 MB are free: 1 MB are missing.")


def test_a_replica_that_a_failed_sleep_left_asleep_is_given_no_requests_until_a_wake_succeeds() -> None:
    stage = Operating()
    stage.operate("sleep", Sleep(["transformer", "vae"]))
    stage.do(0)
    stage.do(1, Unavailable("Sleeping needs 2 MB of /tmp, and 1 MB are free: 1 MB are missing."))
    stage.do(1)
    stage.server(generate("held"))
    stage.do(0, NO_ROOM_TO_WAKE)
    refusal = stage.refusal("sleep")
    assert "2 MB of /tmp" in refusal
    assert "2 MB of cuda:0" in refusal
    assert "/resume_memory_occupation" in refusal
    assert stage.processes[0].asleep == {"transformer", "vae"}
    assert stage.dispatcher.status(stage.now).halted == "asleep"
    stage.server(generate("refused"))
    assert (stage.error("held"), stage.error("refused")) == ("conflict", "conflict")
    stage.operate("wake", Wake(["transformer", "vae"]))
    stage.do_all()
    assert stage.done("wake").asleep == []
    stage.server(generate("served"))
    assert [name for name, _ in stage.started()] == ["served"]


def test_a_replica_that_is_lost_while_a_failed_sleep_is_undone_leaves_the_others_awake() -> None:
    stage = Operating()
    stage.operate("sleep", Sleep(["transformer", "vae"]))
    stage.do(0)
    stage.do(1, Unavailable("Sleeping needs 2 MB of /tmp, and 1 MB are free: 1 MB are missing."))
    stage.kill(1)
    stage.do_all()
    assert "Undoing" not in stage.refusal("sleep")
    assert stage.dispatcher.status(stage.now).halted is None


def test_the_only_replica_that_is_lost_while_it_falls_asleep_fails_the_sleep() -> None:
    stage = Operating(replicas=1)
    stage.operate("sleep", Sleep(["transformer", "vae"]))
    stage.kill(0)
    assert "lost" in stage.refusal("sleep")
    assert stage.dispatcher.status(stage.now).halted is None


def test_a_failed_wake_whose_undo_fails_says_that_memory_is_still_occupied() -> None:
    stage = Operating()
    stage.operate("sleep", Sleep(["transformer", "vae"]))
    stage.do_all()
    stage.operate("wake", Wake(["transformer", "vae"]))
    stage.do(0)
    stage.do(1, NO_ROOM_TO_WAKE)
    stage.do(0, Unavailable("Sleeping needs 2 MB of /tmp, and 1 MB are free: 1 MB are missing."))
    stage.do(1)
    assert "not all of its memory is released" in stage.refusal("wake")
    assert stage.dispatcher.status(stage.now).halted == "asleep"


def test_a_deeper_sleep_that_fails_leaves_the_sleep_that_was() -> None:
    stage = Operating()
    stage.operate("sleep", Sleep(["caches"]))
    stage.do_all()
    stage.operate("deeper", Sleep(["caches", "transformer", "vae"]))
    stage.do(0)
    stage.do(1, Unavailable("Sleeping needs 2 MB of /tmp, and 1 MB are free: 1 MB are missing."))
    stage.do_all()
    assert stage.processes[0].asleep == stage.processes[1].asleep == {"caches"}


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (Sleep(["transformer"]), Sleep(["transformer", "vae"])),
        (Sleep(["transformer", "vae"]), Sleep(["transformer"])),
        (Sleep(["transformer", "vae"]), Wake(["transformer"])),
        (Sleep(["transformer"]), Wake(["transformer", "vae"])),
    ],
)
def test_an_undo_neither_wakes_nor_puts_to_sleep_a_module_that_the_failed_operation_did_not_move(
    first: Sleep, then: Sleep | Wake
) -> None:
    stage = Operating()
    stage.operate("first", first)
    stage.do_all()
    stage.operate("then", then)
    stage.do(0)
    stage.do(1, NO_ROOM_TO_WAKE)
    stage.do_all()
    assert stage.refusal("then")
    assert stage.processes[0].asleep == stage.processes[1].asleep == set(first.tags)
    stage.operate("nothing", Wake([]))
    stage.do_all()
    assert stage.done("nothing").asleep == sorted(first.tags)


@pytest.mark.parametrize("how", ["refused", "lost"])
def test_a_wake_that_one_could_not_do_leaves_all_asleep_as_they_were(how: str) -> None:
    stage = Operating()
    stage.operate("sleep", Sleep(["transformer", "caches"]))
    stage.do_all()
    stage.operate("wake", Wake(["transformer", "vae"]))
    stage.do(0)
    if how == "lost":
        stage.kill(1)
    else:
        stage.do(1, Unavailable("Waking needs 2 MB of cuda:0, and 1 MB are free: 1 MB are missing."))
    stage.server(generate("refused"))
    stage.do_all()
    assert stage.refusal("wake")
    assert stage.processes[0].asleep == {"transformer", "caches"}
    assert stage.error("refused") == "conflict"
    stage.operate("again", Wake(["transformer", "caches"]))
    stage.do_all()
    stage.done("again")
    stage.server(generate("served"))
    assert stage.started()


def paused(stage: Operating, number: int) -> bool | None:
    """The last order to a replica."""
    reported = [order.paused for to, order in stage.to_replicas if to == number and isinstance(order, SetPaused)]
    return reported[-1] if reported else None


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


def test_a_replica_that_joins_during_a_pause_continues_with_the_others() -> None:
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


def test_what_waited_through_a_pause_is_not_drawn_by_replicas_that_were_put_to_sleep_in_it() -> None:
    stage = Operating(replicas=1)
    stage.server(Pause("pause"), generate("waits"))
    stage.operate("sleep", Sleep(["transformer", "vae"]), "wait")
    stage.do_all()
    stage.server(Continue("continue"))
    assert stage.given(0) == []
    stage.operate("u", update(), "wait")
    stage.do_all()
    assert stage.done("u"), "what may not start is not waited for"
    stage.operate("wake", Wake(["transformer", "vae"]))
    stage.do_all()
    assert stage.given(0) == ["waits"]
