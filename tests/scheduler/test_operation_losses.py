"""A replica is lost during an operation: the orders to the others, and the reply to the server."""

import pytest

from safelight.protocol.config import Config
from safelight.protocol.operations import Abort, Commit, Digests, Pause
from safelight.protocol.replicas import ReplicaLoading, ReplicaReady
from safelight.tests.scheduler.operating import Operating, update
from safelight.tests.scheduler.stage import MODEL, generate

JOURNAL = Config(replicas=2, weights_journal="/journal")


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("step", ["prepare", "write"])
def test_a_loss_before_the_commit_leaves_every_byte_on_the_others(step: str, answered: bool, begun: bool) -> None:
    stage = Operating(replicas=3)
    if begun:
        stage.begin()
    stage.operate("u", update(part_of="u" if begun else None))
    stage.up_to(step)
    if answered:
        stage.do(1)
    stage.kill(1)
    assert stage.unanswered("u"), "the others have not said that they did nothing"
    stage.do_all()
    assert "Replica 1 was lost" in stage.refusal("u")
    undone = "release" if step == "prepare" else "rollback"
    assert stage.steps(0)[-1] == stage.steps(2)[-1] == undone
    assert stage.weights() == {0: "checkpoint", 2: "checkpoint"}
    assert not any(process.open for process in stage.processes.values())


def test_a_loss_while_a_part_is_checked_leaves_the_update_open_to_the_others() -> None:
    stage = Operating()
    stage.begin()
    stage.operate("1", update(part_of="u"))
    stage.kill(1)
    stage.do_all()
    stage.refusal("1")
    stage.operate("again", update(part_of="u"))
    stage.do_all()
    stage.commit()
    assert stage.done("commit u").weight_version == "1"


def test_a_loss_between_two_parts_does_not_affect_the_others() -> None:
    stage = Operating()
    stage.begin()
    stage.operate("1", update(part_of="u"))
    stage.do_all()
    stage.kill(1)
    stage.commit()
    assert sorted(stage.done("commit u").reports) == [0]


def test_an_open_update_whose_replicas_are_all_lost_ends_at_once() -> None:
    stage = Operating()
    stage.begin()
    stage.operate("1", update(part_of="u"))
    stage.do_all()
    stage.kill(0)
    stage.kill(1)
    stage.commit()
    assert "its replicas were lost" in stage.refusal("commit u")
    stage.start(1)
    stage.server(generate("served"))
    assert stage.started() == [("served", 1)]


@pytest.mark.parametrize("answered", [False, True])
def test_a_loss_in_a_commit_is_committed_by_the_others_and_counts_only_them(answered: bool) -> None:
    stage = Operating()
    stage.operate("u", update())
    stage.up_to("commit")
    if answered:
        stage.do(1)
    stage.kill(1)
    stage.do_all()
    operated = stage.done("u")
    assert operated.weight_version == "1"
    assert {number: report.weight_version for number, report in operated.reports.items()} == {0: "1"}


def test_an_update_that_all_replicas_are_lost_with_is_never_reported_as_done() -> None:
    stage = Operating()
    stage.operate("u", update())
    stage.up_to("commit")
    stage.kill(0)
    stage.kill(1)
    assert "lost" in stage.refusal("u")
    stage.start(0)
    stage.server(generate("served"))
    assert stage.started() == [("served", 0)], "the checkpoint's weights are the committed ones"
    stage.operate("d", Digests())
    stage.do_all()
    assert stage.done("d").weight_version == "0"


def test_an_update_whose_journal_keeper_is_lost_is_undone_on_the_others() -> None:
    stage = Operating(config=JOURNAL)
    stage.operate("u", update())
    stage.up_to("journal")
    stage.kill(0)
    stage.do_all()
    assert "Replica 0 was lost" in stage.refusal("u")
    assert stage.weights() == {1: "checkpoint"}
    assert stage.steps(1) == ["prepare", "write", "rollback"]


def test_an_update_is_committed_without_one_that_is_lost_while_another_keeps_the_journal() -> None:
    stage = Operating(config=JOURNAL)
    stage.operate("u", update())
    stage.up_to("journal")
    stage.kill(1)
    stage.do_all()
    assert sorted(stage.done("u").reports) == [0]
    assert stage.weights() == {0: "new"}


def test_a_late_answer_of_a_lost_process_is_ignored() -> None:
    stage = Operating()
    stage.operate("u", update())
    stage.up_to("commit")
    lost = stage.processes[1]
    stage.kill(1)
    stage.worker(1, lost.perform(lost.orders[0]))
    stage.do_all()
    assert sorted(stage.done("u").reports) == [0]


def test_an_abort_ends_the_update_though_a_replica_is_lost_with_it() -> None:
    stage = Operating()
    stage.begin()
    stage.operate("1", update(part_of="u"))
    stage.do_all()
    stage.operate("abort", Abort("u"))
    stage.kill(1)
    stage.do_all()
    assert sorted(stage.done("abort").reports) == [0]
    stage.operate("commit", Commit("u"))
    assert "it ended" in stage.refusal("commit"), "there is nothing left of it to commit"


def test_reading_fails_with_a_replica_and_is_not_waited_for() -> None:
    stage = Operating()
    stage.operate("d", Digests())
    stage.do(1)
    stage.kill(1)
    stage.do_all()
    assert "Replica 1 was lost" in stage.refusal("d")


def test_a_process_that_is_there_again_before_its_end_was_seen_does_not_hold_up_the_line() -> None:
    stage = Operating()
    stage.operate("u", update())
    stage.do(0)
    del stage.processes[1]
    stage.worker(1, ReplicaLoading(1, 999, "importing"))
    stage.do_all()
    assert "Replica 1 was lost" in stage.refusal("u")


def test_a_process_that_is_ready_before_its_predecessors_end_was_seen_does_not_hold_up_the_line() -> None:
    stage = Operating()
    stage.operate("u", update())
    stage.do(0)
    stage.start(1)
    stage.do_all()
    assert "Replica 1 was lost" in stage.refusal("u")
    assert stage.serving() == [0, 1]


def test_the_late_report_of_an_old_processes_end_does_not_fail_what_the_new_one_does() -> None:
    stage = Operating()
    stage.start(1)  # in place of one whose end is yet to be reported
    stage.operate("u", update())
    stage.exited(1)
    stage.do_all()
    assert sorted(stage.done("u").reports) == [0, 1]


def test_the_last_words_of_a_process_that_is_gone_are_not_answered_with_orders() -> None:
    stage = Operating(replicas=1)
    stage.operate("u", update())
    pid = stage.processes[0].pid
    stage.kill(0)
    stage.server(Pause("pause", "in_place"))
    stage.worker(0, ReplicaReady(0, pid, MODEL))
    assert stage.serving() == []
