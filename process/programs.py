"""The programs that a command line starts, each a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

SERVER = (sys.executable, "-P", "-m", "safelight.server")
"""``-P`` keeps files of the current folder from shadowing installed modules."""

VERIFICATION = (sys.executable, "-P", "-m", "safelight.worker.accuracy")
"""The program of ``safelight verify``."""


def become(program: Sequence[str], arguments: Sequence[str]) -> NoReturn:
    """Replace this process by ``program``, so that signals and the exit status are the program's."""
    os.execv(program[0], [*program, *arguments])
