"""The standard input of a child process: its configuration, then a pipe whose end means that the launcher is gone."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from ..protocol.child_config import ChildConfig

_STDIN = 0


class _WithDirectory(Protocol):
    @property
    def directories(self) -> list[str]: ...


_Child = TypeVar("_Child", bound=_WithDirectory)

ORPHANED = 3
"""Exit status of a child that ended because its launcher was gone."""


def read_child_config() -> ChildConfig:
    """The configuration of a server's child; see :func:`read_child`."""
    return read_child(ChildConfig)


def read_child(kind: type[_Child]) -> _Child:
    """Read the first line of standard input and from then on end this process when the launcher disappears.

    The launcher's directories are removed then, too.
    """
    os.umask(0o077)  # what it writes is nobody else's to read
    line = _read_line()
    if not line.endswith(b"\n"):  # the launcher was killed before it had written all of it
        os._exit(ORPHANED)
    child = msgspec.json.decode(line, type=kind)
    threading.Thread(target=_exit_with_launcher, args=(child.directories,), daemon=True, name="launcher-watch").start()
    return child


def name_process(name: str) -> None:
    """Show this process as ``sl-`` and ``name`` in ``ps`` and ``top``, which see its first 15 letters; Linux only."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(f"sl-{name}")


def _read_line() -> bytes:
    """One line, unbuffered: a buffered reader's lock, held by the watching thread, would break the shutdown."""
    line = bytearray()
    while not line.endswith(b"\n"):
        received = os.read(_STDIN, 65536)
        if not received:
            break
        line += received
    return bytes(line)


def _exit_with_launcher(directories: list[str]) -> None:
    while os.read(_STDIN, 65536):
        pass
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
    os._exit(ORPHANED)
