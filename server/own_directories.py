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

from ..protocol.child_config import SHARED_MEMORY, ChildConfig
from ..protocol.config import Config
from ..protocol.errors import StartFailed

_PREFIX = "safelight-"
_OWNER = "owner"  # a file that a running server holds a lock on
_NEW = "owner-to-be"
_LONGEST = 80  # a unix socket's path has at most 107 bytes


@contextlib.contextmanager
def own_directories(config: Config) -> Iterator[ChildConfig]:
    """A child's configuration with directories that nobody else can read (mode 0700). They are removed on leaving.

    Directories of servers that were killed are removed first. Raises ``StartFailed`` where none can be made.
    """
    with contextlib.ExitStack() as owned:
        try:
            child = _make_both(config, owned)
        except OSError as error:
            raise StartFailed(
                f"The server cannot make its directories for sockets and tensors ({error}); set TMPDIR to a local "
                "folder that it may write to."
            ) from None
        yield child


def _make_both(config: Config, owned: contextlib.ExitStack) -> ChildConfig:
    temporary = Path(tempfile.gettempdir())
    if len(f"{temporary}/{_PREFIX}12345678") > _LONGEST:
        temporary = Path("/tmp")
    for parent in (temporary, Path(SHARED_MEMORY)):
        remove_abandoned(parent)
    child = ChildConfig(config=config, directory=tempfile.mkdtemp(prefix=_PREFIX, dir=temporary))
    owned.callback(_remove, child.directories)
    os.mkdir(child.shared, 0o700)
    for directory in child.directories:
        owned.enter_context(_own(Path(directory)))
    return child


def remove_abandoned(parent: Path) -> None:
    """Remove the directories in ``parent`` whose server ended without doing so."""
    for directory in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), (directory / _OWNER).open("r+") as file:  # another user's, or no server's
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove([str(directory)])


def _own(directory: Path) -> IO[str]:
    """The owner's file of ``directory``, which nobody sees before it is locked. Raises ``OSError``."""
    file = (directory / _NEW).open("x")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (directory / _NEW).rename(directory / _OWNER)
    except OSError:
        file.close()
        raise
    return file


def _remove(directories: list[str]) -> None:
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
