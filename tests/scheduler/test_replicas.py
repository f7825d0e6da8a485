"""Replicas, and requests on them, when processes start, stall, die and restart."""

from safelight.protocol.config import Config
from safelight.protocol.generation import Failed, Progress, Result
from safelight.protocol.replicas import Heartbeat, ReplicaFailed, ReplicaLoading, ReplicaReady, ReplicaStats
from safelight.tests.scheduler.stage import MODEL, Stage, generate, result, stopped

TWO = Config(replicas=2, max_running=1)


def test_a_replica_goes_from_its_stages_to_ready_with_what_it_serves() -> None:
    stage = Stage(ready=())
    assert stage.replica().state == "starting"
    stage.worker(0, ReplicaLoading(0, 10, "loading the vae"))
    assert (stage.replica().state, stage.replica().message, stage.replica().pid) == ("starting", "loading the vae", 10)
    stage.ready(0, pid=10)
    assert (stage.replica().state, stage.replica().model) == ("ready", MODEL)
    stage.heartbeat(0, ReplicaStats(running=1, forwards=7))
    assert stage.replica().stats.forwards == 7


def test_a_lost_replica_fails_what_it_was_working_on_at_once() -> None:
    stage = Stage()
    stage.server(generate("a"), generate("b"))
    stage.exited(0, "it was killed by signal 9")
    assert [stage.error("a"), stage.error("b")] == ["unavailable", "unavailable"]
    (failed,) = stage.sent(Failed, "a")
    assert (failed.error.status, failed.error.retry_after_s is not None) == (503, True)
    for part in ("Replica 0", "lost", "it was killed by signal 9", "will come back"):
        assert part in failed.error.message
    assert (stage.replica().state, stage.replica().outstanding) == ("lost", 0)


def test_those_who_wait_do_not_wait_for_a_restart() -> None:
    stage = Stage(config=Config(max_running=1))
    stage.server(generate("a"), generate("b"))
    stage.exited()
    assert stage.error("b") == "unavailable"
    stage.ready(0, pid=11)
    assert stage.given(0) == ["a"]


def test_those_who_wait_go_on_waiting_while_another_replica_is_ready() -> None:
    stage = Stage(ready=(0, 1), config=TWO)
    stage.server(generate("a"), generate("b"), generate("c"))
    stage.exited(0)
    assert stage.error("a") == "unavailable"
    assert not stage.sent(Failed, "c")
    stage.worker(1, result("b"))
    assert stage.given(1) == ["b", "c"]


def test_a_new_process_fails_the_old_ones_requests_even_if_nobody_saw_the_old_one_end() -> None:
    stage = Stage()
    stage.server(generate("a"))
    stage.worker(0, ReplicaLoading(0, 11, "importing"))
    assert stage.error("a") == "unavailable"
    assert (stage.replica().state, stage.replica().outstanding, stage.replica().pid) == ("starting", 0, 11)


def test_the_late_report_of_an_old_processes_end_does_not_kill_the_new_one() -> None:
    stage = Stage()
    stage.ready(0, pid=11)
    stage.server(generate("a"))
    stage.exited()  # of pid 10
    assert (stage.replica().state, stage.replica().outstanding) == ("ready", 1)
    stage.worker(0, result("a"))
    assert len(stage.sent(Result, "a")) == 1
    stage.exited()  # of pid 11
    assert stage.replica().state == "lost"


def test_the_reports_of_two_old_processes_are_not_mistaken_for_the_new_ones() -> None:
    stage = Stage()
    stage.worker(0, ReplicaLoading(0, 11, "importing"), ReplicaReady(0, 12, MODEL))
    stage.exited()
    stage.exited()
    assert stage.replica().state == "ready"
    stage.exited()
    assert stage.replica().state == "lost"


def test_the_last_messages_of_a_dead_process_do_not_revive_it() -> None:
    stage = Stage(ready=())
    stage.worker(0, ReplicaLoading(0, 10, "importing"))
    stage.exited()
    last_words = ReplicaReady(0, 10, MODEL), ReplicaLoading(0, 10, "late")
    stage.worker(0, *last_words, Heartbeat(0, 10, ReplicaStats(forwards=3), 1))
    assert (stage.replica().state, stage.replica().stats.forwards) == ("lost", 0)
    stage.ready(0, pid=11)
    assert stage.replica().state == "ready"


def test_restarts_that_die_without_a_word_leave_the_next_one_alive() -> None:
    stage = Stage()
    stage.exited(0, "first")
    stage.exited(0, "second")
    assert (stage.replica().state, stage.replica().message) == ("lost", "second")
    stage.ready(0, pid=13)
    assert stage.replica().state == "ready"
    stage.exited(0, "third")
    assert (stage.replica().state, stage.replica().message) == ("lost", "third")


def test_a_workers_own_reason_is_kept_over_its_exit_status() -> None:
    stage = Stage(ready=())
    stage.worker(0, ReplicaLoading(0, 10, "importing"), ReplicaFailed(0, "There is no model in /models/x."))
    stage.exited(0, "exit status 1")
    assert (stage.replica().state, stage.replica().message) == ("failed", "There is no model in /models/x.")
    stage.exited(0, "exit status 2")  # a restart that died before it could speak
    assert (stage.replica().state, stage.replica().message) == ("lost", "exit status 2")


def test_a_replica_that_fails_after_it_was_ready_fails_its_requests() -> None:
    stage = Stage()
    stage.server(generate("a"))
    stage.worker(0, ReplicaFailed(0, "The GPU fell off the bus."))
    assert stage.error("a") == "unavailable"
    assert stage.replica().outstanding == 0


def test_a_loss_after_a_cancel_gives_the_room_back_once_and_no_second_answer() -> None:
    stage = Stage(config=Config(max_running=1, request_timeout_s=5.0))
    stage.server(generate("a"))
    stage.wait(5.0)
    assert stage.replica().outstanding == 1
    stage.exited()
    assert stage.error("a") == "deadline_passed"
    assert stage.replica().outstanding == 0
    stage.ready(0, pid=11)
    stage.worker(0, stopped("a"))  # the dead process's answer, read late
    assert stage.replica().outstanding == 0
    stage.server(generate("b"), generate("c"))
    assert stage.given(0) == ["a", "b"]


def test_a_silent_replica_gets_no_new_work_until_it_speaks_again() -> None:
    stage = Stage(ready=(0, 1), config=Config(replicas=2, stall_timeout_s=10.0))
    stage.wait(6.0)
    stage.heartbeat(1)
    stage.wait(4.0)
    assert [stage.replica(0).state, stage.replica(1).state] == ["stalled", "ready"]
    stage.server(generate("a"), generate("b"))
    assert stage.started() == [("a", 1), ("b", 1)]
    stage.heartbeat(0)
    assert stage.replica(0).state == "ready"
    stage.server(generate("c"))
    assert stage.started()[-1] == ("c", 0)


def test_a_stall_does_not_fail_what_is_running_but_ends_the_waiting_when_it_leaves_nobody() -> None:
    stage = Stage(config=Config(stall_timeout_s=10.0, max_running=1))
    stage.server(generate("a"), generate("b"))
    stage.wait(10.0)
    assert stage.replica().state == "stalled"
    assert not stage.sent(Failed, "a")
    assert stage.error("b") == "unavailable"
    stage.worker(0, result("a"))
    assert len(stage.sent(Result, "a")) == 1
    assert stage.replica().state == "stalled", "a thread sends results, while the loop may hang"
    stage.heartbeat()
    assert stage.replica().state == "ready"


def test_a_forward_longer_than_the_stall_timeout_leaves_its_replica_ready() -> None:
    stage = Stage(config=Config(stall_timeout_s=10.0, forward_timeout_s=100.0))
    stage.server(generate("a"))
    stage.heartbeat(forward_s=0.5)
    for second in range(1, 100):
        stage.wait(1.0)
        stage.heartbeat(goes_on=False, forward_s=0.5 + second)
    assert stage.replica().state == "ready"
    stage.wait(1.0)
    assert (stage.replica().state, "one forward has run for 100 s" in stage.replica().message) == ("stalled", True)
    stage.heartbeat(goes_on=False, forward_s=100.5)
    assert stage.replica().state == "stalled", "it has not gone on"
    stage.heartbeat()
    assert stage.replica().state == "ready"


def test_a_loop_that_stands_still_between_forwards_is_found_though_its_heartbeats_go_on() -> None:
    stage = Stage(config=Config(stall_timeout_s=10.0))
    stage.heartbeat(forward_s=3.0)
    stage.heartbeat()  # the forward has ended
    for _ in range(9):
        stage.wait(1.0)
        stage.heartbeat(goes_on=False)
        assert stage.replica().state == "ready"
    stage.wait(1.0)
    assert (stage.replica().state, stage.replica().message) == (
        "stalled",
        "no progress for 10 s, though no forward is running",
    )


def test_a_process_that_ends_its_heartbeats_within_a_forward_is_found_by_its_silence() -> None:
    stage = Stage(config=Config(stall_timeout_s=10.0, forward_timeout_s=1000.0))
    stage.heartbeat(forward_s=3.0)
    stage.wait(9.0)
    assert stage.replica().state == "ready"
    stage.wait(1.0)
    assert (stage.replica().state, stage.replica().message) == ("stalled", "no heartbeat for 10 s")


def test_progress_counts_as_a_heartbeat() -> None:
    stage = Stage(config=Config(stall_timeout_s=10.0))
    stage.server(generate("a"))
    for _ in range(5):
        stage.wait(6.0)
        stage.worker(0, Progress("a", 0, 1, 4))
    assert stage.replica().state == "ready"


def test_silence_while_loading_does_not_count_as_a_stall() -> None:
    stage = Stage(ready=(), config=Config(stall_timeout_s=10.0))
    stage.worker(0, ReplicaLoading(0, 10, "loading the transformer"))
    stage.wait(100.0)
    assert stage.replica().state == "starting"
    stage.ready(0, pid=10)
    stage.wait(9.0)
    assert stage.replica().state == "ready"


def test_a_worker_speaks_for_its_own_replica_and_requests_only() -> None:
    stage = Stage(ready=(0,), config=Config(replicas=2))
    stage.server(generate("a"))
    stage.worker(1, ReplicaReady(0, 99, MODEL), result("a"), Progress("a", 0, 1, 4))
    stage.worker(7, ReplicaReady(7, 99, MODEL))
    assert (stage.replica(0).pid, stage.replica(1).state) == (10, "starting")
    assert not stage.sent(Result)
    assert not stage.sent(Progress)
    stage.exited(7)
    stage.exited(-1)
    assert [replica.state for replica in stage.dispatcher.status(stage.now).replicas] == ["ready", "starting"]


def test_each_change_of_state_is_pushed_and_otherwise_a_status_each_second() -> None:
    stage = Stage(ready=())
    stage.wait(0.0)
    stage.wait(0.5)
    assert len(stage.statuses()) == 1
    stage.worker(0, ReplicaLoading(0, 10, "loading the vae"))
    stage.wait(0.01)
    stage.ready()
    stage.wait(0.01)
    stage.exited()
    stage.wait(0.01)
    states = [status.replicas[0].state for status in stage.statuses()]
    assert states == ["starting", "starting", "ready", "lost"]
    stage.wait(0.5)
    assert len(stage.statuses()) == 4
    stage.wait(0.5)
    assert len(stage.statuses()) == 5
    stage.dispatcher.greet()
    stage.wait(0.0)
    assert len(stage.statuses()) == 6
