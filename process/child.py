"""The standard input of a child process: one line of configuration, then a pipe that ends with the launcher."""

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
"""The exit status of a child whose launcher has ended."""


def read_child_config() -> ChildConfig:
    """Read the configuration of a server's child process; see :func:`read_child`."""
    return read_child(ChildConfig)


def read_child(kind: type[_Child]) -> _Child:
    """Read the first line of standard input; from then on, end this process when the launcher ends.

    The launcher's directories are then removed too.
    """
    os.umask(0o077)  # files of this process are private to its user
    line = _read_line()
    if not line.endswith(b"\n"):  # the launcher was killed while it wrote the line
        os._exit(ORPHANED)
    child = msgspec.json.decode(line, type=kind)
    threading.Thread(target=_exit_with_launcher, args=(child.directories,), daemon=True, name="launcher-watch").start()
    return child


def name_process(name: str) -> None:
    """Name this process ``sl-<name>`` in ``ps`` and ``top``, which show 15 characters (Linux only)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(f"sl-{name}")


def _read_line() -> bytes:
    """Read a line without buffering: the watching thread would hold a buffered reader's lock during shutdown."""
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
