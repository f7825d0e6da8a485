"""What a killed server leaves in the temporary folder and in shared memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from safelight.protocol.config import SHARED_MEMORY
from safelight.server.own_directories import remove_abandoned

OWNER = """
import sys
from safelight.protocol.config import Config
from safelight.server.own_directories import own_directories
with own_directories(Config()) as child:
    print(child.directory, child.shared, flush=True)
    sys.stdin.read()
"""


@contextmanager
def owner(temporary: Path) -> Iterator[tuple[subprocess.Popen[str], list[Path]]]:
    """A process with a server's directories, until its standard input closes; and the directories."""
    command = [sys.executable, "-P", "-c", OWNER]
    environment = {"TMPDIR": str(temporary), "PATH": ""}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        yield process, [Path(name) for name in process.stdout.readline().split()]
        process.kill()


def test_the_next_start_removes_the_directories_of_a_killed_server_and_nobody_else_s(tmp_path: Path) -> None:
    user_s = tmp_path / "safelight-pictures"
    user_s.mkdir()
    with owner(tmp_path) as (killed, left), owner(tmp_path) as (_, running):
        killed.kill()
        killed.wait()
        assert all(directory.is_dir() for directory in left), "as it had no time to remove them"
        with owner(tmp_path) as (_, _):
            assert [directory for directory in left if directory.exists()] == []
            assert all(directory.is_dir() for directory in running)
            assert user_s.is_dir()
    for parent in (tmp_path, Path(SHARED_MEMORY)):
        remove_abandoned(parent)
    assert [directory for directory in running if directory.exists()] == []


def test_a_server_that_ends_removes_its_directories_itself(tmp_path: Path) -> None:
    with owner(tmp_path) as (process, own):
        assert all(oct(directory.stat().st_mode)[-3:] == "700" for directory in own)
        process.communicate("")
        assert [directory for directory in own if directory.exists()] == []


@pytest.mark.parametrize("name", ["safelight-notmine1", "other"])
def test_a_directory_that_no_server_made_stays(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "picture.png").write_bytes(b"")
    remove_abandoned(tmp_path)
    assert (tmp_path / name / "picture.png").exists()
