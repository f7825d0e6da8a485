"""The standard input of a child process: its configuration, then a pipe whose end means that the launcher is gone."""

from __future__ import annotations

import os
import shutil
import sys
import threading

import msgspec

from .config import ChildConfig

ORPHANED = 3
"""Exit status of a child that ended because its launcher was gone."""


def read_child_config() -> ChildConfig:
    """Read the first line of standard input and from then on end this process when the launcher disappears."""
    line = sys.stdin.buffer.readline()
    child = msgspec.json.decode(line, type=ChildConfig)
    threading.Thread(target=_exit_with_launcher, args=(child.directory,), daemon=True, name="launcher-watch").start()
    return child


def _exit_with_launcher(directory: str) -> None:
    while sys.stdin.buffer.read(1):
        pass
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(ORPHANED)
