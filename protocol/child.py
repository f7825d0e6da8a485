"""The standard input of a child process: its configuration, then a pipe whose end means that the launcher is gone."""

from __future__ import annotations

import os
import shutil
import threading

import msgspec

from .config import ChildConfig

_STDIN = 0

ORPHANED = 3
"""Exit status of a child that ended because its launcher was gone."""


def read_child_config() -> ChildConfig:
    """Read the first line of standard input and from then on end this process when the launcher disappears."""
    child = msgspec.json.decode(_read_line(), type=ChildConfig)
    threading.Thread(target=_exit_with_launcher, args=(child.directory,), daemon=True, name="launcher-watch").start()
    return child


def _read_line() -> bytes:
    """One line, unbuffered: a buffered reader's lock, held by the watching thread, would break the shutdown."""
    line = bytearray()
    while not line.endswith(b"\n"):
        received = os.read(_STDIN, 65536)
        if not received:
            break
        line += received
    return bytes(line)


def _exit_with_launcher(directory: str) -> None:
    while os.read(_STDIN, 65536):
        pass
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(ORPHANED)
