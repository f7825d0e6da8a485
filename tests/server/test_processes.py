"""The server and its real child processes: how they start, what they survive, and that they leave nothing behind."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from safelight.tests.live import LiveServer

FLAGS = ("--threads", "1")  # two threads that wait for one busy core are slower than one
QUICK = {"prompt": "a red circle", "num_inference_steps": 1, "width": 32, "height": 32}
ENDLESS = {**QUICK, "num_inference_steps": 1000, "width": 256, "height": 256}


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory for temporary files, which has to be empty again in the end. Its path is short, as a socket's is."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
        assert [entry.name for entry in Path(name).iterdir() if entry.name.startswith("safelight")] == []


@pytest.fixture
def asking() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def ask(server: LiveServer, body: dict[str, object]) -> httpx.Response:
    return httpx.post(f"{server.url}/generate", json=body, timeout=60)


def ask_and_wait_until_it_runs(
    server: LiveServer, threads: ThreadPoolExecutor, body: dict[str, object]
) -> Future[httpx.Response]:
    asked = threads.submit(ask, server, body)
    server.wait_for(lambda: running(server) or None, 30)
    return asked


def ask_and_stop_at_the_first_step(server: LiveServer, body: dict[str, object]) -> list[str]:
    events = []
    with httpx.stream("POST", f"{server.url}/generate", json={**body, "stream": True}, timeout=60) as reply:
        for line in reply.iter_lines():
            if line == "event: progress" and line not in events:
                server.signal(signal.SIGTERM)
            if line.startswith("event: "):
                events.append(line)
    return events


def running(server: LiveServer) -> int:
    count: int = httpx.get(f"{server.url}/server_info").json()["running"]
    return count


def wait_until_gone(server: LiveServer, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while server.survivors():
        assert time.monotonic() < deadline, server.survivors()
        time.sleep(0.05)


def start(*arguments: object) -> tuple[subprocess.CompletedProcess[str], float]:
    started = time.monotonic()
    command = [sys.executable, "-P", "-m", "safelight.server", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done, time.monotonic() - started


def test_a_wrong_start_is_one_sentence_on_standard_error_and_status_2(tmp_path: Path) -> None:
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"")
    for arguments, reported in [
        ((tmp_path / "nothing",), "does not exist"),
        ((tmp_path,), "model_index.json"),
        ((pickled,), "pickled weights"),
        (("shapes", "--revision", "v1"), "--revision"),
        (("--port", "x"), "port"),
        (("--host", "0.0.0.0"), "--insecure"),
        (("--no-such-flag",), "--no-such-flag"),
    ]:
        done, seconds = start(*arguments)
        assert done.returncode == 2
        assert reported in done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
        assert seconds < 5


def test_a_signal_before_there_is_anything_to_stop_leaves_nothing(scratch: Path, tiny_flux: Path) -> None:
    for delay in (0.0, 0.3, 0.5, 0.7):
        server = LiveServer(tiny_flux, FLAGS, temporary=scratch, program=True)
        time.sleep(delay)
        server.signal(signal.SIGTERM)
        assert server.wait_exit(10) in (0, -signal.SIGTERM)
        assert "Traceback" not in server.log
        wait_until_gone(server, 5)


def test_a_port_in_use_is_reported_before_anything_is_loaded(tiny_flux: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done, seconds = start(tiny_flux, "--port", port)
    assert done.returncode == 2
    assert f"Port {port} on 127.0.0.1 cannot be used" in done.stderr
    assert done.stderr.count("\n") == 1
    assert seconds < 5


def test_a_model_that_cannot_be_loaded_ends_the_server_with_the_worker_s_sentence(
    tiny_flux: Path, tmp_path: Path, scratch: Path
) -> None:
    broken = shutil.copytree(tiny_flux, tmp_path / "broken")
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "_class_name": "NoSuchPipeline"}))
    with LiveServer(broken, FLAGS, temporary=scratch) as server:
        assert server.wait_exit(60) == 1
        assert str(broken) in server.log.splitlines()[-1]
        worker = re.search(r"started worker 0 with process id (\d+)", server.log)
        assert worker is not None, server.log
        assert not psutil.pid_exists(int(worker[1]))
        wait_until_gone(server, 5)


def test_a_worker_that_is_not_ready_in_time_ends_the_server(tiny_flux: Path, scratch: Path) -> None:
    with LiveServer(tiny_flux, [*FLAGS, "--start-timeout-s", "0.01"], temporary=scratch) as server:
        assert server.wait_exit(30) == 1
        assert "--start-timeout-s" in server.log.splitlines()[-1]
        wait_until_gone(server, 5)


def test_it_answers_while_it_starts_and_sigterm_then_ends_it_with_status_0(tiny_flux: Path, scratch: Path) -> None:
    with LiveServer(tiny_flux, FLAGS, temporary=scratch) as server:
        health = httpx.get(f"{server.url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "starting")
        assert httpx.get(f"{server.url}/liveness").status_code == 200
        assert ask(server, QUICK).status_code == 503
        server.wait_for(lambda: server.children().get("worker"), 10)
        assert server.stop() == 0
        wait_until_gone(server, 0.5)


def test_a_later_start_takes_over_what_the_self_test_has_found_and_draws_the_same(
    tiny_flux: Path, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    drawn = []
    for tried in ((True, False), (False, True)):
        with LiveServer(tiny_flux, FLAGS, temporary=scratch) as server:
            server.wait_ready()
            log = server.log
            assert ("self-test: requests apart" in log, "self-test: one request" in log) == tried
            drawn.append(ask(server, {**QUICK, "seed": 7}).json()["outputs"])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("flag", ["--nursery", "--no-nursery"])
def test_the_life_of_a_server(flag: str, tiny_flux: Path, scratch: Path, asking: ThreadPoolExecutor) -> None:
    """One after the other, because each start costs seconds: ready, serve, lose the worker, serve again, stop."""
    flags = [*FLAGS, "--no-self-test-cache", "--grace-s", "20", flag]
    with LiveServer(tiny_flux, flags, temporary=scratch, program=True) as server:
        server.wait_ready()
        assert server.output == f"ready: {server.url} serves flux\n"
        assert server.url.startswith("http://127.0.0.1:")
        _check_privacy(server, scratch)
        assert ("nursery" in server.children()) == (flag == "--nursery")
        assert ask(server, QUICK).status_code == 200

        asked = ask_and_wait_until_it_runs(server, asking, ENDLESS)
        worker = server.children()["worker"]
        killed_at = time.monotonic()
        worker.kill()
        reply = asked.result()
        assert time.monotonic() - killed_at < 5
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unavailable")
        assert "retry-after" in reply.headers
        assert httpx.get(f"{server.url}/health").status_code == 503
        server.wait_ready()
        assert ask(server, QUICK).status_code == 200
        assert server.children()["worker"].pid != worker.pid
        assert server.log.count("worker-0 [-] self-test: requests apart") == 1, "what is known is not tried again"
        for phase in ("loading the model", "self-test: requests apart", "self-test: one request"):
            assert sum(phase in line for line in server.log.splitlines()) == {"loading the model": 2}.get(phase, 1)

        events = ask_and_stop_at_the_first_step(server, {**ENDLESS, "num_inference_steps": 20})
        assert events[-1] == "event: result", "what runs may finish"
        assert server.wait_exit(30) == 0
        wait_until_gone(server, 0.5)


def test_every_line_is_json_where_that_was_asked_for_and_one_sums_up_the_start(tiny_flux: Path, scratch: Path) -> None:
    with LiveServer(
        tiny_flux, [*FLAGS, "--dtype", "float32", "--log-format", "json"], temporary=scratch, program=True
    ) as server:
        server.wait_ready()
        ask(server, {"prompt": "a", "width": 3})
        server.children()["worker"].send_signal(signal.SIGABRT)  # its end leaves no log line of ours
        server.wait_for_line("was killed by SIGABRT")
        server.signal(signal.SIGTERM)
        assert server.wait_exit(60) == 0
    lines = [json.loads(line) for line in server.log.splitlines()]
    assert server.output == ""
    (ready,) = [line for line in lines if "batching" in line]
    fields = {name: ready[name] for name in ("pipeline", "device", "dtype", "ranks", "batching")}
    assert fields == {"pipeline": "FluxPipeline", "device": "cpu", "dtype": "float32", "ranks": 1, "batching": "merged"}
    assert 0 < ready["seconds"] < 120
    (refused,) = [line for line in lines if line.get("status") == 400]
    assert (refused["method"], refused["path"], refused["field"]) == ("POST", "/generate", "width")
    assert refused["duration_ms"] >= 0


def test_workers_come_from_one_process_that_may_be_lost_and_one_that_never_served_takes_no_other_down(
    tiny_flux: Path, scratch: Path
) -> None:
    """One after the other, because each start costs seconds."""
    with LiveServer(tiny_flux, [*FLAGS, "--replicas", "2"], temporary=scratch, program=True) as server:
        workers = server.wait_for(lambda: found if len(found := _workers(server)) == 2 else None, 60)
        nursery = server.children()["nursery"]
        assert {tuple(worker.cmdline()) for worker in workers} == {tuple(nursery.cmdline())}, "all imported once"
        assert {worker.ppid() for worker in workers} == {server.pid}

        workers[1].suspend()
        server.wait_ready()
        workers[1].kill()
        server.wait_for_line("The process of replica 1 was killed by SIGKILL while it started")
        server.wait_for(lambda: _all_ready(server) or None, 60)

        nursery.kill()
        assert ask(server, QUICK).status_code == 200, "its workers do not need it any more"
        server.children()["worker"].kill()
        server.wait_for(lambda: server.children().get("nursery", nursery).pid != nursery.pid or None, 60)
        server.wait_for(lambda: _all_ready(server) or None, 60)


def test_too_few_descriptors_for_a_new_worker_do_not_end_the_server(tiny_flux: Path, scratch: Path) -> None:
    with LiveServer(tiny_flux, FLAGS, temporary=scratch) as server:
        server.wait_ready()
        process = psutil.Process(server.pid)
        before = process.rlimit(psutil.RLIMIT_NOFILE)
        process.rlimit(psutil.RLIMIT_NOFILE, (3, before[1]))  # fewer than it has open, so that none can be added
        server.children()["worker"].kill()
        server.wait_for_line("Replica 0 could not be started: [Errno 24] Too many open files")
        process.rlimit(psutil.RLIMIT_NOFILE, before)
        server.wait_ready()
        assert ask(server, QUICK).status_code == 200


def test_a_scheduler_that_hangs_ends_the_server_and_the_requests_that_wait(
    tiny_flux: Path, scratch: Path, asking: ThreadPoolExecutor
) -> None:
    with LiveServer(tiny_flux, [*FLAGS, "--stall-timeout-s", "4"], temporary=scratch) as server:
        server.wait_ready()
        asked = ask_and_wait_until_it_runs(server, asking, ENDLESS)
        server.children()["scheduler"].suspend()
        assert server.wait_exit(60) == 1
        assert "The scheduler has said nothing for" in server.log.splitlines()[-1]
        assert asked.result().status_code == 503
        wait_until_gone(server, 5)


def _workers(server: LiveServer) -> list[psutil.Process]:
    """In the order of their replicas' numbers."""
    children = psutil.Process(server.pid).children()
    return sorted((child for child in children if child.name().startswith("sl-worker")), key=lambda child: child.name())


def _all_ready(server: LiveServer) -> bool:
    replicas = httpx.get(f"{server.url}/health").json()["replicas"]
    return all(replica["state"] == "ready" for replica in replicas)


def _check_privacy(server: LiveServer, scratch: Path) -> None:
    (directory,) = scratch.glob("safelight-*")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {entry.name for entry in directory.iterdir()} == {"frontend", "backend", "owner", "self-test.json"}
    for process in (psutil.Process(server.pid), *server.children().values()):
        listening = [c.laddr for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert all(address.ip == "127.0.0.1" for address in listening)
        assert len(listening) == (process.pid == server.pid), "only the server listens on a port"


def test_a_replica_that_cannot_come_back_is_tried_until_it_can(tiny_flux: Path, tmp_path: Path, scratch: Path) -> None:
    model = shutil.copytree(tiny_flux, tmp_path / "model")
    with LiveServer(model, FLAGS, temporary=scratch) as server:
        server.wait_ready()
        model.rename(tmp_path / "away")
        server.children()["worker"].kill()
        server.wait_for_line("It is started again in 1 s")
        server.wait_for_line("It is started again in 2 s")
        assert httpx.get(f"{server.url}/health").json()["replicas"][0]["state"] != "ready"
        (tmp_path / "away").rename(model)
        server.wait_ready()
        assert ask(server, QUICK).status_code == 200


def test_what_outlasts_the_grace_time_gets_a_503(tiny_flux: Path, scratch: Path, asking: ThreadPoolExecutor) -> None:
    with LiveServer(tiny_flux, [*FLAGS, "--grace-s", "0.5"], temporary=scratch) as server:
        server.wait_ready()
        asked = ask_and_wait_until_it_runs(server, asking, ENDLESS)
        stopped_at = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - stopped_at < 30, "it waited for a request that takes minutes"
        assert asked.result().status_code == 503


def test_a_second_ctrl_c_stops_at_once(tiny_flux: Path, scratch: Path, asking: ThreadPoolExecutor) -> None:
    with LiveServer(tiny_flux, [*FLAGS, "--grace-s", "60"], temporary=scratch) as server:
        server.wait_ready()
        asked = ask_and_wait_until_it_runs(server, asking, ENDLESS)
        server.signal(signal.SIGINT)
        server.wait_for_line("SIGINT: stopping")
        server.signal(signal.SIGINT)
        assert server.wait_exit(3) == 130
        wait_until_gone(server, 0.5)
        assert asked.exception() is not None or asked.result().status_code == 503


@pytest.mark.parametrize("victim", ["server", "scheduler"])
def test_kill_9_of_the_server_or_the_scheduler_leaves_nothing_running(
    victim: str, tiny_flux: Path, scratch: Path
) -> None:
    with LiveServer(tiny_flux, FLAGS, temporary=scratch, program=True) as server:
        server.wait_ready()
        if victim == "server":
            server.signal(signal.SIGKILL)
            assert server.wait_exit(10) == -signal.SIGKILL
        else:
            server.children()["scheduler"].kill()
            assert server.wait_exit(10) == 1
            assert "The scheduler was killed by SIGKILL" in server.log.splitlines()[-1]
        wait_until_gone(server, 10)
