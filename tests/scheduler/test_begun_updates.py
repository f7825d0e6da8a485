"""Begun updates: many parts, one version, and nobody who waits for ever."""

import math

import pytest

from safelight.protocol.codec import Buffer
from safelight.protocol.config import Config
from safelight.protocol.errors import Internal
from safelight.protocol.generation import Cancel
from safelight.protocol.operations import Abort, Begin, Commit, Digests, Leave, Update
from safelight.protocol.replicas import Hold
from safelight.protocol.tensor_sources import Broadcast, Pickled, Source
from safelight.tests.scheduler.operating import REFUSED, Operating, update
from safelight.tests.scheduler.stage import generate, result


def test_parts_are_written_as_they_come_and_serve_together_under_one_version() -> None:
    stage = Operating()
    stage.operate("begin", Begin(update_id="u", weight_version="both"))
    stage.server(generate("held"))
    stage.operate("1", update("new", "transformer", part_of="u", version="ignored"))
    stage.operate("2", update("new", "vae", part_of="u"))
    stage.do_all()
    assert (stage.done("1").weight_version, stage.done("2").weight_version) == ("0", "0")
    assert stage.given(0) == []
    stage.commit()
    assert stage.done("commit u").weight_version == "both"
    assert stage.steps(1) == ["prepare", "write", "prepare", "write", "commit"]
    assert stage.started() == [("held", 0)]


def test_an_open_update_waits_like_any_operation_for_what_came_before_it() -> None:
    stage = Operating(replicas=1)
    stage.server(generate("runs"))
    stage.operate("begin", Begin(update_id="u"), "wait")
    assert stage.unanswered("begin")
    stage.worker(0, result("runs"))
    stage.done("begin")


def test_a_refused_part_leaves_the_update_open_and_what_it_wrote_there() -> None:
    stage = Operating()
    stage.begin()
    stage.operate("good", update("new", part_of="u"))
    stage.do_all()
    stage.operate("wrong", update("wrong", "vae", part_of="u"))
    stage.do(1, REFUSED)
    stage.do_all()
    assert stage.refusal("wrong") == REFUSED.message
    stage.commit()
    assert stage.done("commit u").weight_version == "1"
    assert (stage.weights("transformer"), stage.weights("vae")) == (
        {0: "new", 1: "new"},
        dict.fromkeys((0, 1), "checkpoint"),
    )


def test_a_write_that_fails_ends_the_update_with_every_part_of_it_undone() -> None:
    stage = Operating()
    stage.begin()
    stage.operate("1", update("new", "vae", part_of="u"))
    stage.do_all()
    stage.operate("2", update("new", part_of="u"))
    stage.operate("waits", update("later", part_of="u"))
    stage.up_to("write")
    stage.do(0)
    stage.do(1, Internal("The operation failed."))
    stage.do_all()
    assert (stage.steps(0)[-1], stage.steps(1)[-1]) == ("rollback", "rollback")
    assert "has ended" in stage.refusal("waits")
    stage.commit()
    assert "'u'" in stage.refusal("commit u")
    assert set(stage.weights("vae").values()) | set(stage.weights().values()) == {"checkpoint"}


def test_a_journal_that_fails_ends_the_update_with_every_part_of_it_undone() -> None:
    stage = Operating(config=Config(replicas=2, weights_journal="/journal"))
    stage.begin()
    stage.operate("1", update(part_of="u"))
    stage.do_all()
    stage.operate("commit", Commit("u"))
    assert [(to, order.step) for to, order in stage.ordered][-1] == (0, "journal")
    stage.do(0, Internal("The journal could not be written."))
    stage.do_all()
    assert "journal" in stage.refusal("commit")
    assert stage.weights() == {0: "checkpoint", 1: "checkpoint"}
    stage.operate("after", Digests())
    stage.do_all()
    stage.done("after")


def test_nothing_written_is_nothing_to_commit_and_the_update_stays_open() -> None:
    stage = Operating()
    stage.begin()
    stage.commit()
    assert "Nothing was written" in stage.refusal("commit u")
    stage.operate("abort", Abort("u"))
    stage.do_all()
    assert stage.done("abort").weight_version == "0"


def test_require_complete_asks_for_every_tensor_of_what_was_touched_and_of_nothing_else() -> None:
    stage = Operating()
    stage.begin()
    stage.operate("half", update("half", part_of="u"))
    stage.do_all()
    stage.commit(require_complete=True)
    assert "transformer" in stage.refusal("commit u")
    stage.operate("whole", update("whole", part_of="u"))
    stage.do_all()
    stage.operate("again", Commit("u", require_complete=True))
    stage.do_all()
    assert stage.done("again").weight_version == "1"


def test_aborting_puts_every_byte_back_and_lets_the_line_go_on() -> None:
    stage = Operating()
    stage.begin()
    stage.operate("1", update(part_of="u"))
    stage.server(generate("held"))
    stage.do_all()
    stage.operate("abort", Abort("u"))
    stage.do_all()
    assert stage.steps(0) == stage.steps(1) == ["prepare", "write", "rollback"]
    assert stage.done("abort").weight_version == "0"
    assert stage.weights() == {0: "checkpoint", 1: "checkpoint"}
    assert stage.started() == [("held", 0)]


OTHERS: list[Source] = [
    update("new", "vae").source,
    Pickled([], ["transformer", "vae"]),
    Broadcast("group", "vae", [], [], []),
]


@pytest.mark.parametrize("source", OTHERS, ids=lambda source: type(source).__name__)
def test_a_part_for_a_module_that_the_update_was_not_begun_for_reaches_no_replica(source: Source) -> None:
    stage = Operating()
    stage.begin(modules=["transformer"])
    stage.operate("other", Update(source=source, update_id="u"))
    assert "vae" in stage.refusal("other")
    left = [Leave("group")] * 2 if isinstance(source, Broadcast) else []
    assert [order.operation for _, order in stage.ordered] == left
    stage.operate("own", update(part_of="u"))
    stage.do_all()
    stage.commit()
    stage.done("commit u")


def test_the_version_that_a_part_names_is_the_update_s_where_its_begin_names_none() -> None:
    stage = Operating()
    stage.begin()
    stage.operate("1", update(part_of="u", version="41"))
    stage.operate("2", update("new", "vae", part_of="u"))
    stage.do_all()
    stage.commit()
    assert stage.done("commit u").weight_version == "41"


def test_a_part_that_is_refused_does_not_name_the_update() -> None:
    stage = Operating()
    stage.begin()
    stage.operate("refused", update(part_of="u", version="41"))
    for replica in (0, 1):
        stage.do(replica, REFUSED)
    stage.do_all()
    assert stage.refusal("refused")
    stage.operate("written", update("new", part_of="u", version="42"))
    stage.do_all()
    stage.commit()
    assert stage.done("commit u").weight_version == "42"


def test_a_part_of_an_update_that_has_ended_is_refused() -> None:
    stage = Operating()
    stage.begin()
    stage.operate("1", update(part_of="u"))
    stage.do_all()
    stage.commit()
    stage.operate("late", update("late", part_of="u"))
    assert "it ended" in stage.refusal("late")
    assert stage.weights() == {0: "new", 1: "new"}


def test_a_second_update_waits_for_the_end_of_the_one_that_is_open() -> None:
    stage = Operating()
    stage.begin("first")
    stage.operate("begin second", Begin(update_id="second"))
    stage.operate("early", update(part_of="second"))
    assert "'second'" in stage.refusal("early"), "no reply has said that it has begun"
    assert stage.unanswered("begin second")
    stage.operate("abort", Abort("first"))
    stage.do_all()
    stage.done("begin second")


def test_an_update_that_falls_silent_is_undone() -> None:
    stage = Operating()
    stage.begin(timeout_s=10.0)
    stage.operate("1", update(part_of="u"))
    stage.server(generate("held"))
    stage.do_all()
    assert stage.dispatcher.next_turn() <= stage.now + 10.0
    stage.wait(9.9)
    assert stage.started() == []
    stage.wait(0.1)
    stage.do_all()
    assert stage.weights() == {0: "checkpoint", 1: "checkpoint"}
    assert stage.started() == [("held", 0)]
    stage.commit()
    assert "nothing of it came for 10 s" in stage.refusal("commit u")
    assert stage.dispatcher.next_turn() < math.inf


def test_a_part_gives_an_update_its_time_again() -> None:
    stage = Operating()
    stage.begin(timeout_s=10.0)
    for number in range(3):
        stage.wait(9.0)
        stage.operate(f"{number}", update(f"{number}", part_of="u"))
        stage.do_all()
        stage.done(f"{number}")
    stage.wait(9.0)
    stage.commit()
    assert stage.done("commit u").weight_version == "1"


def test_the_time_of_an_update_does_not_run_while_it_waits_for_its_turn() -> None:
    stage = Operating(replicas=1)
    stage.server(generate("runs", timeout_s=100.0))
    stage.operate("begin", Begin(update_id="u", timeout_s=10.0), "wait")
    stage.wait(50.0)
    stage.worker(0, result("runs"))
    stage.done("begin")
    stage.wait(9.0)
    stage.operate("1", update(part_of="u"))
    stage.do_all()
    stage.done("1")


def test_a_part_that_takes_longer_than_the_time_between_parts_does_not_end_the_update() -> None:
    stage = Operating()
    stage.begin(timeout_s=10.0)
    stage.operate("1", update("new", part_of="u"))
    stage.wait(30.0)
    stage.do_all()
    stage.done("1")
    stage.wait(9.0)
    stage.commit()
    assert stage.done("commit u").weight_version == "1"


def test_the_loop_sleeps_while_a_part_takes_longer_than_the_time_between_parts() -> None:
    stage = Operating()
    stage.begin(timeout_s=10.0)
    stage.operate("1", update("new", part_of="u"))
    stage.wait(10.0)
    assert stage.dispatcher.next_turn() > stage.now


def broadcast(part_of: str | None = None) -> Update:
    return Update(source=Broadcast("group", "transformer", ["w"], ["float32"], [[1]]), update_id=part_of)


@pytest.mark.parametrize("why", ["no such update", "the client is gone", "the update has ended"])
def test_a_broadcast_that_nobody_will_receive_ends_its_group(why: str) -> None:
    stage = Operating()
    if why == "no such update":
        stage.operate("it", broadcast("gone"))
    elif why == "the client is gone":
        stage.server(generate("runs"))
        stage.operate("it", broadcast(), "wait")
        stage.server(Cancel("it"))
        stage.worker(0, result("runs"))
    else:
        stage.begin()
        stage.operate("part", update(part_of="u"))
        stage.commit()
        stage.operate("it", broadcast("u"))
    stage.do_all()
    assert [order.operation for _, order in stage.ordered if isinstance(order.operation, Leave)] == [Leave("group")] * 2
    stage.operate("after", update())
    stage.do_all()
    stage.done("after")


def test_a_client_that_goes_on_sending_parts_cannot_hold_back_generation_for_ever() -> None:
    stage = Operating(config=Config(replicas=2, max_update_hold_s=60.0))
    stage.begin(timeout_s=50.0)
    stage.server(generate("held"))
    for number in range(3):
        stage.operate(str(number), update(part_of="u"))
        stage.do_all()
        stage.wait(29.0)
    stage.do_all()
    assert stage.weights() == {0: "checkpoint", 1: "checkpoint"}
    assert stage.started() == [("held", 0)]
    stage.commit()
    assert "--max-update-hold-s" in stage.refusal("commit u")


def test_the_status_says_what_holds_back_generation_since_when_and_for_how_long_yet() -> None:
    stage = Operating()
    stage.begin(timeout_s=50.0)
    stage.server(generate("held"))
    stage.wait(0.0)
    assert stage.statuses()[-1].hold is not None, "the status reports it at once"
    stage.wait(7.0)
    assert stage.statuses()[-1].hold == Hold(operation="Begin", phase="open", held_s=7.0, update_id="u", ends_in_s=43.0)
    stage.operate("abort", Abort("u"))
    stage.do_all()
    stage.wait(0.0)
    assert stage.statuses()[-1].hold is None


def test_an_operator_ends_a_begun_update_without_its_id_and_before_the_parts_that_wait() -> None:
    stage = Operating()
    stage.begin()
    for number in range(3):
        stage.operate(f"part {number}", update(part_of="u"))
    stage.operate("commit", Commit("u"))
    stage.operate("abort", Abort(None))
    stage.do_all()
    stage.done("abort")
    assert stage.steps(0) == ["prepare", "write", "rollback"]
    assert "was aborted" in stage.refusal("commit")
    assert stage.weights() == {0: "checkpoint", 1: "checkpoint"}
    stage.operate("again", Abort(None))
    assert "no begun update" in stage.refusal("again")


def test_an_update_whose_begin_waits_for_running_requests_can_be_aborted() -> None:
    stage = Operating(replicas=1)
    stage.server(generate("runs"))
    stage.operate("begin", Begin(update_id="u"), "wait")
    stage.operate("abort", Abort("u"))
    stage.done("abort")
    assert "was aborted" in stage.refusal("begin")
    stage.server(generate("next"))
    assert stage.started() == [("runs", 0), ("next", 0)]


def test_operations_behind_a_begun_update_are_counted_and_one_too_many_is_refused_but_not_its_end() -> None:
    stage = Operating(config=Config(replicas=2, max_operations=3))
    stage.begin()
    for number in range(5):
        stage.operate(str(number), Digests())
    assert [stage.unanswered(str(number)) for number in range(5)] == [True] * 3 + [False] * 2
    assert stage.error("3") == "queue_full"
    stage.wait(1.0)
    assert stage.statuses()[-1].queued_operations == 3
    stage.operate("abort", Abort("u"))
    stage.do_all()
    stage.done("abort")
    stage.done("2")


def test_payloads_behind_a_begun_update_are_bounded_in_bytes_but_one_always_may_wait() -> None:
    stage = Operating(config=Config(replicas=2, max_queue_mb=1))
    stage.begin()
    for number in range(3):
        payload = Pickled([Buffer(bytes(700_000))], ["transformer"])
        stage.operate(str(number), Update(source=payload))
    assert [stage.unanswered(str(number)) for number in range(3)] == [True, False, False]
    stage.wait(1.0)
    assert 700_000 < stage.statuses()[-1].queued_bytes < 701_000
    stage.server(Cancel("0"))
    stage.operate("3", Update(source=Pickled([Buffer(bytes(1_700_000))], ["transformer"])))
    assert stage.unanswered("3")
