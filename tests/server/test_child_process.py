"""The environment and descriptors of a child process, as the system shows them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from safelight.process.child import ORPHANED
from safelight.protocol.child_config import ChildConfig
from safelight.protocol.config import Config
from safelight.server.child_process import ChildProcess

pytestmark = pytest.mark.anyio


async def test_no_child_process_has_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELIGHT_API_KEY", "open-sesame")
    config = ChildConfig(config=Config(api_key="open-sesame"), directory=str(tmp_path))
    assert "open-sesame" not in repr(config.without_key())
    child = await ChildProcess.start("scheduler", config)
    try:
        process = psutil.Process(child.pid)
        assert "open-sesame" not in " ".join([*process.cmdline(), *process.environ().values()])
    finally:
        await child.stop(at_once=True)


@pytest.mark.parametrize("written", ["", '{"config": {"model": "sha'])
async def test_a_launcher_that_is_killed_while_it_writes_the_configuration_leaves_no_process(written: str) -> None:
    command = [sys.executable, "-P", "-c", "from safelight.process.child import read_child_config as r; r()"]
    ended = await asyncio.to_thread(subprocess.run, command, input=written, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (ORPHANED, "")


@pytest.mark.parametrize("missing", ["to wait for it", "to write its configuration"])
async def test_where_the_system_has_no_more_threads_no_process_is_left_and_the_supervisor_learns_it(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor tries again after an ``OSError``, and would end the server by any other."""

    before = psutil.Process().children()

    def none_left(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    if missing == "to wait for it":
        monkeypatch.setattr(threading.Thread, "start", none_left)
    else:
        monkeypatch.setattr(asyncio, "to_thread", none_left)
    with pytest.raises(OSError, match="can't start new thread"):
        await ChildProcess.start("scheduler", ChildConfig(config=Config(), directory=str(tmp_path)))
    assert psutil.Process().children() == before
