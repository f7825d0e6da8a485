"""A server for one command: a child process that ends with the command."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Thread
from types import FrameType
from typing import IO, Self

from ..process import programs
from ..protocol.errors import StartFailed
from .results import Health
from .sync_client import Client

_LISTENING = re.compile(r"listening on (http://\S+)")
_LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
_STOP_S = 45.0
_LINES_KEPT = 200


class PrivateServer:
    """A context in which a server for ``model`` runs; ``None`` serves the model of the environment or the default.

    Port 0 takes a free port. ``options`` are further options of ``safelight serve``. Within the context, SIGTERM and
    SIGHUP exit through the context instead of ending this process at once (from the main thread only); the server ends
    with this process in any case.
    """

    def __init__(
        self,
        model: str | None,
        *,
        port: int = 0,
        options: Sequence[str] = (),
        program: Sequence[str] = programs.SERVER,
    ) -> None:
        place = ("--host", "127.0.0.1", "--port", str(port), "--log-level", "info", "--log-format", "text")
        self._command = [*program, *([] if model is None else [model]), *options, *place, "--until-stdin-closes"]
        self._listening: Future[str] = Future()
        self._tail: deque[str] = deque(maxlen=_LINES_KEPT)

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,  # the system closes it however this process ends, and then the server ends too
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,  # Ctrl-C reaches only this process, which closes its requests and then stops the server
        )
        assert self._process.stdout is not None, "stdout=PIPE"
        Thread(target=self._read, args=(self._process.stdout,), daemon=True, name="server-output").start()
        self._taken = _take_signals()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._stop()
        finally:
            _give_back(self._taken)

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self._process.terminate()  # a second signal ends a server at once
            self._wait_or_kill()

    @property
    def url(self) -> str:
        """Wait for the server's address. Raises ``StartFailed``, with its last message, if the server ended."""
        return self._listening.result()

    def wait_until_ready(self, client: Client, timeout: float, on_change: Callable[[Health], None]) -> None:
        """``client.wait_until_ready``; raises ``StartFailed`` if the server ends."""

        def check(health: Health) -> None:
            if not health.answers:
                self._wait_or_kill()
                raise self._failure()
            on_change(health)

        client.wait_until_ready(timeout, check)

    def _read(self, output: IO[str]) -> None:
        for line in output:
            self._tail.append(line.strip())
            if not self._listening.done() and (found := _LISTENING.search(line)):
                self._listening.set_result(found[1])
        if not self._listening.done():
            self._process.wait()
            self._listening.set_exception(self._failure())

    def _failure(self) -> StartFailed:
        """The error with the server's last message; lines of its log count only if there are no others."""
        lines = [line for line in self._tail if line]
        messages = [line for line in lines if not _LOG_LINE.match(line)]
        return StartFailed((messages or lines or [f"The server ended with status {self._process.returncode}."])[-1])

    def _wait_or_kill(self) -> None:
        try:
            self._process.wait(_STOP_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self._process.kill()
            self._process.wait()


def _take_signals() -> list[signal.Signals]:
    """Exit through the context on signals that would end this process at once; signals with a handler keep it."""
    if threading.current_thread() is not threading.main_thread():
        return []
    taken = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _exit_on)
    return taken


def _give_back(taken: Sequence[signal.Signals]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in taken:
            if signal.getsignal(number) == _exit_on:  # otherwise another handler was installed meanwhile
                signal.signal(number, signal.SIG_DFL)


def _exit_on(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
