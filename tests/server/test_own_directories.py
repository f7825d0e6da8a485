"""Files that a killed server leaves in the temporary folder and in shared memory."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from safelight.protocol.child_config import SHARED_MEMORY
from safelight.protocol.config import Config
from safelight.protocol.errors import StartFailed
from safelight.server.own_directories import own_directories, remove_abandoned

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


def wait_until_gone(directories: list[Path]) -> None:
    """Wait, as the start of another test's server may be about to remove what lies in shared memory."""
    deadline = time.monotonic() + 60
    while any(directory.exists() for directory in directories):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def test_the_next_start_removes_the_directories_of_a_killed_server_and_nobody_else_s(temporary: Path) -> None:
    user_s = temporary / "safelight-pictures"
    user_s.mkdir()
    with owner(temporary) as (killed, left), owner(temporary) as (_, running):
        killed.kill()
        killed.wait()
        assert all(directory.is_dir() for directory in left), "as it had no time to remove them"
        with owner(temporary) as (_, _):
            wait_until_gone(left)
            assert all(directory.is_dir() for directory in running)
            assert user_s.is_dir()
    for parent in (temporary, Path(SHARED_MEMORY)):
        remove_abandoned(parent)
    wait_until_gone(running)


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


def test_where_no_file_can_be_locked_the_start_ends_with_a_sentence(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(StartFailed, match="set TMPDIR"), own_directories(Config()):
        pass
    assert [*temporary.iterdir()] == []


def test_where_shared_memory_is_read_only_tensors_come_through_the_temporary_folder(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with own_directories(Config()) as child:
        assert Path(child.shared).parent == Path(child.directory)
        assert Path(child.shared).is_dir()


def test_nobody_can_take_a_directory_for_abandoned_while_its_server_makes_it(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    lock = fcntl.flock

    def another_start(file: IO[str], how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        for parent in (temporary, Path(SHARED_MEMORY)):
            remove_abandoned(parent)
        lock(file, how)
        monkeypatch.setattr(fcntl, "flock", another_start)

    monkeypatch.setattr(fcntl, "flock", another_start)
    with own_directories(Config()) as child:
        assert all(Path(directory, "owner").exists() for directory in child.directories)
        monkeypatch.undo()
