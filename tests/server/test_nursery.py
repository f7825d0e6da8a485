"""The launcher's side of the nursery, with the nursery's own loop and without its imports, which take seconds."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from safelight.protocol.child_config import ChildConfig
from safelight.protocol.config import Config
from safelight.server import nursery as launchers
from safelight.server.child_process import ChildProcess
from safelight.server.nursery import Nursery

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not Nursery.AVAILABLE, reason="only Linux lets a process adopt orphans"),
]

PROGRAM = """
import os, socket
from safelight.worker.rank.nursery import _fork_workers
stdin = _fork_workers(socket.socket(fileno=os.dup(0)))
while stdin is not None and os.read(stdin, 65536):
    pass
"""


def spawn(module: str, stdin: int) -> int:
    command = [sys.executable, "-P", "-c", PROGRAM]
    return os.posix_spawn(
        sys.executable, command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, stdin, 0)], setsid=True
    )


@pytest.fixture
async def nursery(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Nursery]:
    monkeypatch.setattr(launchers, "spawn", spawn)
    started = Nursery()
    yield started
    await started.stop()


async def fork(nursery: Nursery, folder: Path) -> ChildProcess:
    return await nursery.fork(ChildConfig(config=Config(), directory=str(folder), replica=0))


def process_of(nursery: Nursery) -> psutil.Process:
    assert nursery._running is not None
    return psutil.Process(nursery._running.process.pid)


def test_the_nursery_does_not_wait_for_the_imports_of_the_http_server() -> None:
    program = (
        "import sys, safelight.server.launch\n"
        "print(sorted(set(sys.modules) & {'fastapi', 'starlette', 'uvicorn', 'pydantic', 'zmq', 'numpy', 'torch'}))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


async def test_a_nursery_that_is_stopped_holds_up_no_worker(
    nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await fork(nursery, tmp_path)
    stopped = process_of(nursery)
    stopped.suspend()
    monkeypatch.setattr(launchers, "FORK_S", 0.2)
    with pytest.raises(OSError, match=r"did not do so within 0\.2 s"):
        await fork(nursery, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(launchers, "spawn", spawn)
    second = await fork(nursery, tmp_path)
    assert not stopped.is_running()
    assert first.running, "its workers do not need it any more"
    await asyncio.gather(first.stop(at_once=True), second.stop(at_once=True))


async def test_a_nursery_that_is_killed_before_its_first_fork_is_reported_and_started_again(
    nursery: Nursery, tmp_path: Path
) -> None:
    killed = process_of(nursery)
    killed.suspend()
    asked = asyncio.create_task(fork(nursery, tmp_path))
    await asyncio.sleep(0)
    killed.kill()
    with pytest.raises(OSError, match=r"was killed by SIGKILL|reset by peer"):
        await asked
    worker = await fork(nursery, tmp_path)
    assert psutil.Process(worker.pid).ppid() == os.getpid()
    await worker.stop(at_once=True)
