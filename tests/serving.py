"""Servers that tests share: one for each model and set of flags, started when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safelight.tests.live import LiveServer

MOST = 3
"""Servers that wait for another use. Taking one more ends the one that waited longest."""


def by_family(*families: str) -> list[Any]:
    """Parameters of tests, whose tests with the same family run in one process and find its servers running."""
    return [pytest.param(family, marks=pytest.mark.xdist_group(family)) for family in families]


class Servers:
    """Ready servers with one thread. Each test leaves the weights, adapters and processes of its server as they were.

    A server is the caller's until the next call, so a fixture of a wider scope than a test's must not keep one.
    """

    def __init__(self, checkpoint: Callable[[str], Path]) -> None:
        self._checkpoint = checkpoint
        self._running: dict[tuple[str, ...], LiveServer] = {}

    def __call__(self, family: str, *flags: str) -> LiveServer:
        """The path of the tiny ``family``'s checkpoint."""
        key = (family, *flags)
        server = self._running.pop(key, None)
        if server is None:
            while len(self._running) >= MOST:
                self._running.pop(next(iter(self._running))).stop(at_once=True)
            server = LiveServer(self._checkpoint(family), ["--threads", "1", *flags]).__enter__()
        self._running[key] = server
        return server.wait_ready()

    def stop(self) -> None:
        for server in self._running.values():
            server.stop(at_once=True)
