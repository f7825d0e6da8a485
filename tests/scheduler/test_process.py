"""The scheduler as a process: what it does on its sockets, and how it ends."""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from safelight.process.child import ORPHANED
from safelight.protocol.codec import Buffer
from safelight.protocol.config import Config
from safelight.protocol.generation import Cancel, Failed, Generate, Preview, Progress, Queued, Result, Started
from safelight.protocol.replicas import Heartbeat, ReplicaExited, ReplicaReady, ReplicaStats, Status
from safelight.tests.scheduler.process import PATIENCE_S, Scheduler
from safelight.tests.scheduler.stage import MODEL, generate, result, stopped

Start = Callable[..., Scheduler]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts schedulers and ends them with the test."""
    started: list[Scheduler] = []

    def start(config: Config, directory: str | None = None) -> Scheduler:
        started.append(Scheduler(config, directory))
        return started[-1]

    yield start
    for scheduler in started:
        scheduler.close()


@pytest.fixture
def scheduler(start: Start) -> Scheduler:
    return start(Config())


def test_a_request_lives_as_the_protocol_says(scheduler: Scheduler) -> None:
    server = scheduler.server()
    worker = scheduler.ready_worker(server)
    asked = generate("a", 2, priority=3)
    picture = os.urandom(5_000_000)
    server.send(asked)
    assert server.expect(Queued) == Queued("a", 0)
    started = server.expect(Started)
    assert (started.request_id, started.replica) == ("a", 0)
    assert worker.receive() == asked
    preview = Preview("a", 1, 1, 4, Buffer(b"jpeg"))
    worker.send(Progress("a", 0, 1, 4), preview, result("a", picture, total_s=1.0))
    assert server.expect(Progress) == Progress("a", 0, 1, 4)
    assert server.expect(Preview) == preview
    answer = server.expect(Result)
    assert answer.outputs[0].data == Buffer(picture)
    assert answer.timings.queue_s == started.queue_s
    assert answer.timings.total_s == started.queue_s + 1.0


def test_a_server_that_says_hello_learns_the_status_and_without_a_worker_gets_a_503(scheduler: Scheduler) -> None:
    server = scheduler.server()
    server.send(generate("a"))
    failed = server.expect(Failed)
    assert (failed.error.status, failed.error.code) == (503, "unavailable")
    assert "replica 0 is starting" in failed.error.message


def test_the_status_comes_about_every_second_without_any_event(scheduler: Scheduler) -> None:
    server = scheduler.server()
    before = server.expect(Status)
    begin = time.monotonic()
    server.send(Cancel("nobody's"), Cancel("nobody's"))
    server.expect(Status)
    after = server.expect(Status)
    assert 1.5 < time.monotonic() - begin < 4.0
    assert after.heard - before.heard == 2, "the server counts on it, to know what is still on its way"


def test_no_polling_interval_lies_in_the_path_of_a_request(scheduler: Scheduler) -> None:
    server = scheduler.server()
    worker = scheduler.ready_worker(server)
    seconds = []
    for index in range(31):
        begin = time.monotonic()
        server.send(generate(f"r{index}"))
        worker.receive()
        worker.send(result(f"r{index}"))
        server.expect(Result)
        seconds.append(time.monotonic() - begin)
    assert statistics.median(seconds) < 0.05


def test_a_deadline_wakes_the_loop_without_a_message(scheduler: Scheduler) -> None:
    server = scheduler.server()
    worker = scheduler.ready_worker(server)
    seconds = []
    for index in range(3):
        begin = time.monotonic()
        server.send(generate(f"a{index}", timeout_s=0.3))
        failed = server.expect(Failed)
        assert failed.error.code == "deadline_passed"
        seconds.append(time.monotonic() - begin)
    assert min(seconds) > 0.25
    assert statistics.median(seconds) < 0.9  # the next status would wake it after a second
    assert worker.expect(Cancel) == Cancel("a0")


def test_a_cancel_reaches_the_worker_and_the_server_need_not_wait_for_it(scheduler: Scheduler) -> None:
    server = scheduler.server()
    worker = scheduler.ready_worker(server)
    server.send(generate("a"))
    server.expect(Started)
    server.send(Cancel("a"))
    assert server.expect(Failed).error.code == "client_gone"
    assert worker.expect(Cancel) == Cancel("a")
    worker.send(stopped("a"), Heartbeat(0, 10, ReplicaStats(cancelled=1), 1))
    status = server.expect(Status, lambda status: status.replicas[0].stats.cancelled == 1)
    assert status.replicas[0].outstanding == 0


def test_a_lost_replica_fails_its_requests_and_its_successor_takes_over_the_identity(scheduler: Scheduler) -> None:
    server = scheduler.server()
    dead = scheduler.ready_worker(server, pid=10)
    server.send(generate("a"))
    dead.expect(Generate)
    server.send(ReplicaExited(0, "it was killed by signal 9"))
    failed = server.expect(Failed)
    assert (failed.request_id, failed.error.status) == ("a", 503)
    # The dead one's socket is still open, as after a SIGKILL whose traces the kernel has not cleared away yet.
    worker = scheduler.ready_worker(server, pid=11)
    server.send(generate("b"))
    assert worker.expect(Generate).request_id == "b"
    worker.send(result("b"))
    assert server.expect(Result).request_id == "b"


def test_malformed_messages_from_either_side_are_dropped(scheduler: Scheduler) -> None:
    server = scheduler.server()
    worker = scheduler.ready_worker(server)
    stranger = scheduler.worker(b"replica-63")  # no such replica
    nested = b"\x83\xa4type\xa8Generate\xaarequest_id\xa1a\xa5extra\x81\xa1a" + b"\x91" * 100_000
    for peer in (server, worker, stranger):
        peer.send_frames(b"")
        peer.send_frames(b"not msgpack", b"and a frame")
        peer.send_frames(b"\x82\xa4type\xa6Cancel\xaarequest_id\xa2\xff\xfe")  # no UTF-8
        peer.send_frames(b"\x82\xa4type\xa7Preview\xa5image\xcd\xff\xff")  # a frame that is not there
        peer.send_frames(nested)
        peer.send_frames(b"\x81\xa4type\xa7Unknown")
        peer.send_frames(*[b"x"] * 50)
    stranger.send(ReplicaReady(63, 99, MODEL), result("a"))
    server.send(ReplicaExited(63, "never was"), generate("a"))
    assert worker.expect(Generate).request_id == "a"
    worker.send(result("a"))
    assert server.expect(Result).request_id == "a"
    assert scheduler.process.poll() is None
    assert "malformed" in scheduler.log()
    assert "Traceback" not in scheduler.log()


def test_a_peer_without_a_replicas_identity_is_ignored(scheduler: Scheduler) -> None:
    server = scheduler.server()
    strangers = (b"replica-", b"replica-x", b"replica-99999999999999", b"\xff\x01")
    for identity in strangers:
        scheduler.worker(identity).send(ReplicaReady(0, 99, MODEL))
    worker = scheduler.ready_worker(server, pid=10)
    server.send(generate("a"))
    assert worker.expect(Generate).request_id == "a"
    server.expect(Status)
    assert scheduler.log().count("which is not a replica") == len(strangers)


def test_work_that_a_busy_worker_does_not_fetch_yet_is_kept_for_it(start: Start) -> None:
    """A ROUTER drops silently at its high-water mark, by default 1,000 messages."""
    count = 3000
    scheduler = start(Config(max_running=4096, max_queue=4096))
    server = scheduler.server()
    worker = scheduler.ready_worker(server)
    server.send(*(generate(f"r{index}") for index in range(count)))
    for _ in range(count):
        server.expect(Started)
    assert [worker.expect(Generate).request_id for _ in range(count)] == [f"r{index}" for index in range(count)]


def test_messages_for_a_server_that_is_gone_do_no_harm_and_the_next_server_is_served(scheduler: Scheduler) -> None:
    gone = scheduler.server()
    worker = scheduler.ready_worker(gone)
    gone.send(generate("a"))
    worker.expect(Generate)
    gone.close()
    worker.send(result("a", os.urandom(100_000)))
    server = scheduler.server()
    server.send(generate("b"))
    assert worker.expect(Generate).request_id == "b"
    worker.send(result("b"))
    reported = [server.expect(Result).request_id]
    if reported == ["a"]:  # which the scheduler heard when it had a new server already; that knows no such request
        reported.append(server.expect(Result).request_id)
    assert reported[-1] == "b"


def test_sigterm_ends_it_with_status_0_even_with_requests_in_flight(scheduler: Scheduler) -> None:
    server = scheduler.server()
    scheduler.ready_worker(server)
    server.send(generate("a"))
    server.expect(Started)
    begin = time.monotonic()
    scheduler.process.send_signal(signal.SIGTERM)
    assert scheduler.process.wait(PATIENCE_S) == 0
    assert time.monotonic() - begin < 3.0
    assert "Traceback" not in scheduler.log()
    assert "Fatal" not in scheduler.log()


def test_ctrl_c_is_left_to_the_launcher(scheduler: Scheduler) -> None:
    server = scheduler.server()
    scheduler.process.send_signal(signal.SIGINT)
    server.expect(Status)
    server.expect(Status)
    assert scheduler.process.poll() is None


def test_it_ends_and_leaves_no_sockets_when_the_launcher_is_gone(scheduler: Scheduler) -> None:
    scheduler.server()
    scheduler.launcher_pipe.close()
    assert scheduler.process.wait(PATIENCE_S) == ORPHANED
    assert not os.path.exists(scheduler.directory)


def test_sockets_that_cannot_be_bound_are_named_in_the_log_and_the_status_is_1(start: Start) -> None:
    scheduler = start(Config(), "/nonexistent/safelight")
    assert scheduler.process.wait(PATIENCE_S) == 1
    assert "/nonexistent/safelight" in scheduler.log()
    assert "Traceback" not in scheduler.log()


def test_the_scheduler_never_imports_torch() -> None:
    code = "import sys, safelight.scheduler.__main__; print(sorted({'torch', 'numpy', 'diffusers'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
