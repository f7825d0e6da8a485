"""What a child process is given, as the system shows it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from safelight.protocol.child import ORPHANED
from safelight.protocol.config import ChildConfig, Config
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
    command = [sys.executable, "-P", "-c", "from safelight.protocol.child import read_child_config as r; r()"]
    ended = await asyncio.to_thread(subprocess.run, command, input=written, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (ORPHANED, "")
