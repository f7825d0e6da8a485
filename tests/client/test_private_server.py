"""The server that `safelight generate` starts for itself."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from safelight.client import Client, Health
from safelight.client.private_server import PrivateServer
from safelight.process.programs import SERVER
from safelight.protocol.errors import StartFailed

LISTENER = """
import http.server, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503); self.end_headers()
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(f"2026-01-01 00:00:00 INFO listening on http://127.0.0.1:{server.server_port}", flush=True)
"""


@pytest.fixture(autouse=True)
def _signals_are_as_before() -> Iterator[None]:
    """An error within a context."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def played(tmp_path: Path, program: str) -> PrivateServer:
    """A private server whose program is ``program`` instead."""
    path = tmp_path / "program.py"
    path.write_text(program)
    return PrivateServer(None, program=(sys.executable, str(path)))


def test_a_failed_start_is_reported_in_the_servers_own_words(tmp_path: Path) -> None:
    started = time.monotonic()
    with PrivateServer(str(tmp_path / "nothing")) as server, pytest.raises(StartFailed, match="nothing"):
        _ = server.url
    assert time.monotonic() - started < 20


def test_a_server_that_ends_while_it_loads_is_not_waited_for(tmp_path: Path) -> None:
    program = LISTENER + "server.handle_request(); print('The checkpoint lacks a file.'); sys.exit(1)"
    with (
        played(tmp_path, program) as server,
        Client(server.url) as client,
        pytest.raises(StartFailed, match="lacks a file"),
    ):
        server.wait_until_ready(client, 60, lambda health: None)


def test_the_client_says_what_it_waits_for(tmp_path: Path) -> None:
    heard: list[Health] = []
    program = LISTENER + "server.handle_request(); sys.exit('over')"
    with (
        played(tmp_path, program) as server,
        Client(server.url) as client,
        pytest.raises(StartFailed, match="over"),
    ):
        server.wait_until_ready(client, 60, heard.append)
    assert [health.ready for health in heard] == [False]


def test_it_is_stopped_by_sigterm_and_waited_for(tmp_path: Path) -> None:
    marker = tmp_path / "stopped"
    program = (
        LISTENER + f"signal.signal(signal.SIGTERM, lambda *_: (open({str(marker)!r}, 'w'), sys.exit(0)))\n"
        "server.serve_forever()"
    )
    with played(tmp_path, program) as server:
        assert server.url.startswith("http://127.0.0.1:")
        time.sleep(0.5)  # for the handler
    assert marker.exists()


def test_a_great_deal_of_output_does_not_stop_it(tmp_path: Path) -> None:
    program = LISTENER + "print('x' * 200 * 4096, flush=True)\nserver.handle_request()\nsys.exit(0)"
    with played(tmp_path, program) as server, Client(server.url) as client:
        assert not client.health().ready


@pytest.fixture
def hung_up_by_sighup() -> Iterator[None]:
    """Also where tests run under ``nohup``, whose disposition of it they would hand on."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hung_up_by_sighup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_no_server_outlives_the_command_that_is_stopped(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "server.py").write_text(LISTENER + "server.serve_forever()")
    command = (
        "import sys, time\nfrom safelight.client.private_server import PrivateServer\n"
        f"server = PrivateServer(None, program=[sys.executable, {str(tmp_path / 'server.py')!r}])\n"
        "with server:\n    print(server.url, flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline()
    (child,) = psutil.Process(process.pid).children()
    process.send_signal(number)
    process.wait(20)
    assert not child.is_running()


def test_no_server_outlives_a_command_that_is_killed() -> None:
    command = (
        "import time\nfrom safelight.client.private_server import PrivateServer\n"
        "with PrivateServer('shapes') as server:\n    print(server.url, flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline()
    (server,) = psutil.Process(process.pid).children()
    while len(children := server.children(recursive=True)) < 2:  # the scheduler and the worker
        time.sleep(0.05)
    process.kill()
    process.wait(20)
    _, alive = psutil.wait_procs([server, *children], timeout=45)
    assert [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []


def test_a_server_whose_standard_input_has_ended_stops() -> None:
    command = [*SERVER, "shapes", "--port", "0", "--until-stdin-closes"]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60).returncode == 0


@pytest.mark.usefixtures("hung_up_by_sighup")
def test_a_program_s_own_handlers_stay_its_own(tmp_path: Path) -> None:
    def own(*_: object) -> None:
        raise AssertionError("nobody sends it")

    before = signal.signal(signal.SIGTERM, own)
    try:
        with played(tmp_path, LISTENER + "server.serve_forever()"):
            assert signal.getsignal(signal.SIGTERM) is own
            assert signal.getsignal(signal.SIGHUP) not in (signal.SIG_DFL, own)
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)) == (own, signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_program_that_cannot_be_started_leaves_the_signals_alone() -> None:
    with pytest.raises(OSError, match="/nothing"), PrivateServer(None, program=["/nothing"]):
        pass


def test_a_notebook_s_or_trainer_s_thread_can_have_one_too(tmp_path: Path) -> None:
    def use() -> str:
        with played(tmp_path, LISTENER + "server.serve_forever()") as server:
            return server.url

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(use).result(60).startswith("http://127.0.0.1:")
