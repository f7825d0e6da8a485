"""A server's own directories, which are removed with it, or by the next server's start where it was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..protocol.config import SHARED_MEMORY, ChildConfig, Config

_PREFIX = "safelight-"
_OWNER = "owner"  # a file that a running server holds a lock on
_LONGEST = 80  # a unix socket's path has at most 107 bytes


@contextlib.contextmanager
def own_directories(config: Config) -> Iterator[ChildConfig]:
    """A child's configuration with directories that nobody else can read (mode 0700). They are removed on leaving.

    Directories of servers that were killed are removed first.
    """
    temporary = Path(tempfile.gettempdir())
    if len(f"{temporary}/{_PREFIX}12345678") > _LONGEST:
        temporary = Path("/tmp")
    for parent in (temporary, Path(SHARED_MEMORY)):
        remove_abandoned(parent)
    with contextlib.ExitStack() as owned:
        directory = _make(temporary, owned)
        child = ChildConfig(config=config, directory=str(directory))
        owned.callback(_remove, child.directories)
        os.mkdir(child.shared, 0o700)
        if (lock := _lock(Path(child.shared), "a")) is not None:
            owned.enter_context(lock)
        yield child


def remove_abandoned(parent: Path) -> None:
    """Remove the directories in ``parent`` whose server ended without doing so."""
    for directory in parent.glob(f"{_PREFIX}*"):
        if (lock := _lock(directory, "r+")) is not None:
            with lock:
                _remove([str(directory)])


def _make(parent: Path, owned: contextlib.ExitStack) -> Path:
    while True:
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        lock = _lock(directory, "a")
        if lock is not None:
            owned.enter_context(lock)
            if (directory / _OWNER).exists():  # another start has not just taken it for an abandoned one
                return directory


def _lock(directory: Path, mode: str) -> IO[str] | None:
    """The locked file of ``directory``'s owner; ``None`` where another process has it, or where it is not ours."""
    try:
        file = (directory / _OWNER).open(mode)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _remove(directories: list[str]) -> None:
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
