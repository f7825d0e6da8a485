"""What a child process is given, as the system shows it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

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
