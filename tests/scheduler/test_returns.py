"""Replicas that come while others serve: they serve what was committed, or nothing, and nobody waits for ever."""

import pytest

from safelight.protocol.config import Config
from safelight.protocol.errors import Internal
from safelight.protocol.generation import Cancel
from safelight.protocol.operations import Abort, Begin, Commit, Digests, Sleep, TakeSnapshot, Update, Wake
from safelight.protocol.reports import Operated
from safelight.protocol.tensor_sources import Files
from safelight.tests.scheduler.operating import Operating, Process, update
from safelight.tests.scheduler.stage import generate


def updated(stage: Operating, word: str = "new", module: str = "transformer") -> None:
    name = f"{module} becomes {word}"
    stage.operate(name, update(word, module))
    stage.do_all()
    stage.done(name)


def all_alike(stage: Operating, word: str, module: str = "transformer") -> bool:
    """True if all replicas serve ``word`` in the end."""
    stage.do_all()
    alike = len({process.version for process in stage.processes.values()}) == 1
    return (
        alike
        and stage.weights(module) == dict.fromkeys(stage.processes, word)
        and stage.serving() == sorted(stage.processes)
    )


def test_a_replica_that_comes_back_reads_what_another_wrote_out_before_it_serves() -> None:
    stage = Operating()
    updated(stage)
    stage.kill(1)
    stage.start(1)
    assert "version 1" in stage.replica(1).message
    assert stage.serving() == [0]
    assert (stage.steps(0)[-1], isinstance(stage.processes[0].orders[0].operation, TakeSnapshot)) == ("prepare", True)
    before = len(stage.sent(Operated))
    assert all_alike(stage, "new")
    assert stage.steps(1)[-3:] == ["prepare", "write", "commit"]
    assert len(stage.sent(Operated)) == before, "nobody asked for it"
    assert stage.processes[1].version == "1"


def test_before_the_first_update_a_returning_replica_serves_at_once() -> None:
    stage = Operating(ready=1)
    stage.start(1)
    assert (stage.serving(), stage.ordered) == ([0, 1], [])


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("ends", ["commit", "abort", "timeout"])
def test_what_comes_while_an_update_is_open_serves_what_it_leaves(ends: str, before: bool) -> None:
    stage = Operating(ready=1)
    if before:
        updated(stage, "before")
    stage.begin()
    stage.operate("1", update("new", part_of="u"))
    stage.do_all()
    stage.start(1)
    assert stage.serving() == [0], "it has no part in the update"
    if ends == "timeout":
        stage.wait(10.0)
    else:
        stage.operate("end", Commit("u") if ends == "commit" else Abort("u"))
    unchanged = "before" if before else "checkpoint"
    assert all_alike(stage, "new" if ends == "commit" else unchanged)


@pytest.mark.parametrize("step", ["prepare", "write", "commit"])
def test_what_comes_while_an_update_is_written_serves_it_too(step: str) -> None:
    stage = Operating(ready=1)
    stage.operate("u", update())
    stage.up_to(step)
    stage.start(1)
    assert all_alike(stage, "new")


def test_what_comes_before_an_update_has_begun_takes_part_in_it() -> None:
    stage = Operating(ready=1)
    stage.server(generate("runs"))
    stage.operate("begin", Begin(update_id="u"), "abort")
    stage.start(1)
    assert stage.serving() == [0, 1]


def test_modules_that_were_changed_while_a_replica_waited_are_brought_to_it_too() -> None:
    stage = Operating()
    updated(stage)
    stage.begin()
    stage.kill(1)
    stage.start(1)
    stage.operate("1", update("newer", "vae", part_of="u"))
    stage.do_all()
    stage.commit()
    assert all_alike(stage, "new")
    assert all_alike(stage, "newer", "vae")


def test_another_writes_out_when_the_one_that_did_is_lost() -> None:
    stage = Operating(replicas=3)
    updated(stage)
    stage.kill(2)
    stage.start(2)
    stage.kill(0)
    assert all_alike(stage, "new")
    assert stage.serving() == [1, 2]


def test_weights_that_were_written_out_outlive_the_one_that_had_them() -> None:
    stage = Operating()
    updated(stage)
    stage.kill(1)
    stage.start(1)
    stage.up_to("write")
    stage.kill(0)
    assert all_alike(stage, "new"), "replica 1 has read them"
    stage.start(0)
    assert all_alike(stage, "new")


@pytest.mark.parametrize("step", ["prepare", "write"])
def test_weights_that_are_lost_in_the_middle_are_asked_for(step: str) -> None:
    stage = Operating()
    updated(stage)
    stage.kill(1)
    stage.start(1)
    if step == "write":
        stage.do(0)
        stage.kill(1)
    stage.kill(0)
    stage.start(0)
    stage.do_all()
    assert stage.serving() == []
    assert "were lost" in stage.replica(0).message
    updated(stage, "sent again")
    assert stage.weights()[0] == "sent again"
    assert 0 in stage.serving()


def test_lost_weights_are_not_made_up_from_half_of_them() -> None:
    stage = Operating(replicas=1)
    updated(stage)
    stage.kill(0)
    stage.start(0)
    stage.operate("half", update("half"))
    stage.do_all()
    assert "every tensor of transformer" in stage.refusal("half")
    updated(stage, "else", "vae")
    assert stage.serving() == []
    stage.begin()
    stage.operate("1", update("half", part_of="u"))
    stage.do_all()
    stage.operate("too early", Commit("u"))
    assert "every tensor of transformer" in stage.refusal("too early")
    stage.operate("2", update("whole", part_of="u"))
    stage.do_all()
    stage.commit()
    assert all_alike(stage, "whole")


def test_what_comes_while_lost_weights_are_sent_again_gets_all_of_them() -> None:
    stage = Operating()
    updated(stage)
    stage.kill(1)
    stage.kill(0)
    stage.start(0)
    stage.begin()
    stage.operate("1", update("again", part_of="u"))
    stage.do_all()
    stage.start(1)
    stage.commit()
    assert all_alike(stage, "again")


def test_what_comes_between_two_lost_modules_does_not_serve_one_of_them() -> None:
    stage = Operating()
    updated(stage, "new")
    updated(stage, "new", "vae")
    stage.kill(1)
    stage.kill(0)
    stage.start(0)
    updated(stage, "again")
    stage.start(1)
    updated(stage, "again", "vae")
    served = {stage.weights()[number] for number in stage.serving()}
    assert served <= {"again"}
    updated(stage, "once more")
    updated(stage, "once more", "vae")
    assert all_alike(stage, "once more")


def test_what_comes_while_one_of_two_lost_modules_is_sent_does_not_serve_without_it() -> None:
    stage = Operating()
    updated(stage, "new", "vae")
    stage.kill(1)
    stage.kill(0)
    stage.start(0)
    stage.operate("transformer", update("again"))
    stage.operate("vae", update("again", "vae"))
    stage.up_to("write")
    stage.start(1)
    stage.do_all()
    assert stage.done("transformer").reports.keys() == {0}
    assert stage.done("vae").reports.keys() == {0, 1}
    assert all_alike(stage, "again"), "replica 0 has both, and gives replica 1 the one that it lacks"
    assert all_alike(stage, "again", "vae")


def test_a_replica_that_is_lost_while_it_waits_to_be_brought_up_is_not_waited_for() -> None:
    stage = Operating(replicas=3)
    updated(stage)
    stage.kill(1)
    stage.begin()
    stage.start(1)
    stage.kill(1)
    stage.operate("abort", Abort("u"))
    stage.operate("after", Digests())
    stage.do_all()
    assert sorted(stage.done("after").reports) == [0, 2]
    stage.start(1)
    assert all_alike(stage, "new")


def test_a_replica_that_is_lost_while_another_writes_out_for_it_is_not_waited_for() -> None:
    stage = Operating()
    updated(stage)
    stage.kill(1)
    stage.start(1)
    stage.kill(1)
    stage.operate("after", Digests())
    stage.do_all()
    assert sorted(stage.done("after").reports) == [0]
    assert stage.replica(1).state == "lost"


@pytest.mark.parametrize("step", ["prepare", "write", "commit"])
def test_a_replica_that_is_lost_while_it_is_brought_up_comes_back_for_another_try(step: str) -> None:
    stage = Operating()
    updated(stage)
    stage.kill(1)
    stage.start(1)
    stage.do(0)
    while stage.processes[1].orders[0].step != step:
        stage.do(1)
    stage.kill(1)
    assert stage.replica(1).state == "lost", "its process is gone, which is more than that it cannot be brought up"
    stage.server(generate("served"))
    assert stage.started() == [("served", 0)]
    stage.start(1)
    assert all_alike(stage, "new")


def test_a_replica_that_dies_again_and_again_before_it_has_read_its_snapshot_does_not_fill_the_memory() -> None:
    stage = Operating()
    updated(stage)
    for _ in range(3):
        stage.kill(1)
        stage.start(1)
        stage.do(0)
    folders = [order.operation.folder for _, order in stage.ordered if isinstance(order.operation, TakeSnapshot)]
    assert folders == ["replica-1"] * 3, "each snapshot takes the place of the one before"


@pytest.mark.parametrize("who", [0, 1])
def test_what_cannot_be_brought_up_says_so_and_holds_up_nobody(who: int) -> None:
    """The supervisor starts it again then."""
    stage = Operating()
    updated(stage)
    stage.kill(1)
    stage.start(1)
    if who == 1:
        stage.do(0)
    stage.do(who, Internal("There is no room in shared memory."))
    stage.do_all()
    assert (stage.replica(1).state, stage.serving()) == ("failed", [0])
    assert "no room" in stage.replica(1).message
    stage.server(generate("served"))
    assert stage.started() == [("served", 0)]


def test_a_replica_that_has_read_the_journal_serves_at_once() -> None:
    stage = Operating(config=Config(replicas=2, weights_journal="/journal"))
    updated(stage)
    stage.kill(1)
    stage.kill(0)
    read = Process(0, 0, "1", {"transformer": "new", "vae": "checkpoint"})
    reported = len(stage.ordered)
    stage.start(0, read)
    assert (stage.serving(), len(stage.ordered)) == ([0], reported)
    stage.start(1)  # with a journal that had missed it
    assert all_alike(stage, "new")
    assert "journal" in stage.steps(1)[-4:]


def test_a_journal_never_has_less_than_was_committed_when_lost_weights_are_sent_again() -> None:
    stage = Operating(config=Config(replicas=2, weights_journal="/journal"))
    stage.operate("both", Update(source=Files({"transformer": ["new"], "vae": ["new"]})))
    stage.do_all()
    stage.kill(1)
    stage.kill(0)
    stage.start(0)  # with a journal that had missed the update
    stage.operate("one", update("again"))
    stage.do_all()
    assert "every tensor of transformer, vae at once" in stage.refusal("one")
    assert [order.step for _, order in stage.ordered].count("journal") == 1
    stage.begin()
    stage.operate("1", update("again", part_of="u"))
    stage.do_all()
    stage.operate("too early", Commit("u"))
    assert "every tensor of transformer, vae at once" in stage.refusal("too early")
    stage.operate("2", update("again", "vae", part_of="u"))
    stage.do_all()
    stage.commit()
    assert all_alike(stage, "again")
    assert all_alike(stage, "again", "vae")


def test_the_journal_knows_what_became_of_a_commit_that_all_were_lost_in() -> None:
    stage = Operating(config=Config(replicas=2, weights_journal="/journal"))
    stage.operate("u", update(version="in doubt"))
    stage.up_to("commit")
    stage.kill(0)
    stage.kill(1)
    stage.refusal("u")
    stage.start(0, Process(0, 0, "in doubt", {"transformer": "new", "vae": "checkpoint"}))
    stage.start(1)
    assert all_alike(stage, "new")


def test_a_returning_replica_sleeps_as_the_others_do() -> None:
    stage = Operating()
    stage.operate("sleep", Sleep(["transformer", "vae"]))
    stage.do_all()
    stage.kill(1)
    stage.start(1)
    stage.do_all()
    assert stage.processes[1].asleep == {"transformer", "vae"}
    assert stage.processes[0].asleep == {"transformer", "vae"}


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("tags", [["transformer", "vae"], ["transformer", "vae", "caches"]])
def test_a_replica_that_returns_while_the_others_wake_is_not_put_to_sleep_after_them(
    tags: list[str], changed: bool
) -> None:
    stage = Operating()
    if changed:
        updated(stage)
    stage.operate("sleep", Sleep(["transformer", "vae", "caches"]))
    stage.do_all()
    stage.kill(1)
    stage.operate("wake", Wake(tags))
    stage.start(1)
    stage.do_all()
    assert stage.processes[0].asleep == stage.processes[1].asleep == {"transformer", "vae", "caches"} - set(tags)
    assert stage.serving() == [0, 1]


def test_a_replica_that_joins_while_the_others_are_put_to_sleep_sleeps_too() -> None:
    stage = Operating(ready=1)
    stage.operate("sleep", Sleep(["transformer", "vae"]))
    stage.start(1)
    stage.do_all()
    assert stage.processes[1].asleep == {"transformer", "vae"}


def test_a_silent_replica_that_speaks_again_serves_what_was_committed_meanwhile() -> None:
    stage = Operating()
    stage.wait(119.0)
    stage.heartbeat(0)
    stage.wait(2.0)
    assert stage.replica(1).state == "stalled"
    stage.operate("u", update())
    stage.do_all()
    stage.heartbeat(1)
    stage.do_all()
    stage.done("u")
    assert stage.serving() == [0, 1]
    assert stage.weights() == {0: "new", 1: "new"}


def test_a_silent_replica_is_not_asked_for_its_weights_while_another_has_them() -> None:
    stage = Operating(replicas=3)
    updated(stage)
    stage.wait(119.0)
    stage.heartbeat(1)
    stage.wait(2.0)
    stage.kill(2)
    stage.start(2)
    assert not stage.processes[0].orders
    stage.do_all()
    assert stage.serving() == [1, 2]


def test_a_servers_greeting_takes_back_nothing_of_our_own() -> None:
    """It is a ``Cancel`` of no request."""
    stage = Operating()
    updated(stage)
    stage.operate("d", Digests())
    stage.kill(1)
    stage.do_all()
    stage.operate("d2", Digests())
    stage.start(1)
    stage.server(Cancel(""))
    assert all_alike(stage, "new")


def test_a_commit_that_all_replicas_were_lost_in_is_not_resumed_while_one_serves_without_it() -> None:
    stage = Operating(replicas=3, ready=2, config=Config(replicas=3, weights_journal="/journal"))
    stage.operate("u", update(version="in doubt"))
    stage.up_to("commit")
    stage.kill(0)
    stage.kill(1)
    stage.start(2)  # it read the journal before the commit
    assert stage.serving() == [2]
    stage.start(0, Process(0, 0, "in doubt", {"transformer": "new", "vae": "checkpoint"}))
    stage.start(1)
    assert all_alike(stage, "checkpoint")


def test_a_commit_that_all_were_lost_in_is_not_taken_up_after_one_has_served_without_it() -> None:
    stage = Operating(replicas=3, ready=2, config=Config(replicas=3, weights_journal="/journal"))
    stage.operate("u", update(version="in doubt"))
    stage.up_to("commit")
    stage.kill(0)
    stage.kill(1)
    stage.refusal("u")
    stage.start(2)  # it read the journal before the commit
    assert stage.serving() == [2]
    stage.kill(2)
    stage.start(0, Process(0, 0, "in doubt", {"transformer": "new", "vae": "checkpoint"}))
    stage.do_all()
    assert stage.serving() == [], "its weights would be those of an update that was reported as failed"
    assert "update transformer again" in stage.replica(0).message
    updated(stage, "sent again")
    assert all_alike(stage, "sent again")


def test_weights_on_disk_are_not_called_lost_because_of_another_module_that_was_sent() -> None:
    stage = Operating()
    stage.operate("from disk", Update(source=Files({"transformer": ["new"]}, stamps={"new": [1]})))
    stage.do_all()
    stage.kill(1)
    stage.begin()
    stage.operate("vae", update("newer", "vae"))
    stage.start(1)
    stage.kill(0)  # the begun update ends with it, and replica 1 is the only one to take the next
    stage.do_all()
    stage.done("vae")
    assert all_alike(stage, "new")
    assert all_alike(stage, "newer", "vae")


def test_a_journal_s_version_of_the_same_name_is_not_what_was_committed_while_it_was_read() -> None:
    stage = Operating(config=Config(replicas=2, weights_journal="/journal"))
    for word in ("first", "second"):
        stage.operate(word, update(word, version="latest"))
        stage.do_all()
        stage.done(word)
        if word == "first":
            stage.kill(1)
            read = Process(1, 0, version="latest", weights={"transformer": "first", "vae": "checkpoint"})
    stage.start(1, read)
    assert all_alike(stage, "second")


def test_a_new_process_is_not_asked_for_the_weights_that_its_predecessor_had() -> None:
    """It is ready before the end of the other was seen, which lets the next in line be brought up."""
    stage = Operating(replicas=3)
    updated(stage)
    stage.kill(2)
    stage.operate("digests", Digests())
    stage.start(2)
    stage.do(1)
    stage.start(0)
    assert all_alike(stage, "new")


def test_all_who_were_put_to_sleep_are_woken_though_one_comes_that_has_the_weights() -> None:
    stage = Operating(config=Config(replicas=2, weights_journal="/journal"))
    updated(stage)
    stage.kill(0)
    stage.kill(1)
    stage.start(0)  # with a journal that had missed the update
    stage.operate("sleep", Sleep(["transformer", "vae"]))
    stage.operate("wake", Wake(["transformer", "vae"]))
    stage.start(1, Process(1, 0, "1", {"transformer": "new", "vae": "checkpoint"}))
    assert all_alike(stage, "new")
    assert not any(process.asleep for process in stage.processes.values())
