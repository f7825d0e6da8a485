"""A real server with all its processes, for tests and benchmarks that speak to it over real sockets."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

import httpx
import psutil

from safelight.tests.fork_server import FORKS_PROGRAMS
from safelight.tests.forked import Forked

T = TypeVar("T")

_AT_ONCE_S = 10.0
_LISTENING = re.compile(r"listening on (http://[^\s\"]+)")


class LiveServer:
    """A server on a free port, as a context that ends at once, with every process gone.

    It is ``python -m safelight.server`` where ``program`` is set or ``environment`` is given, as that may change what
    libraries do; else it is forked, as are all its processes (:mod:`.forked`). It ends with the tests' process, however
    that ends.

    ``flags`` are further command line flags. Entering waits until the server listens; :meth:`wait_ready` until it
    serves. ``log`` and ``output`` are what it wrote so far to standard error (its children too) and standard output.
    """

    def __init__(
        self,
        model: str | Path,
        flags: Sequence[str] = (),
        *,
        environment: Mapping[str, str] | None = None,
        temporary: Path | None = None,
        program: bool = False,
    ) -> None:
        arguments = [str(model), "--port", "0", "--until-stdin-closes", *flags]
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
        if temporary is not None:
            variables["TMPDIR"] = str(temporary)
        options: dict[str, Any] = {
            "env": variables, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
            "start_new_session": True,
        }  # fmt: skip
        self._process: subprocess.Popen[str]
        if program or environment:
            command = [sys.executable, "-P", "-m", "safelight.server", *arguments]
            self._process = subprocess.Popen(command, text=True, **options)
        else:
            self._process = Forked("safelight.server.launch:main", arguments, **options)
        self._lines: list[str] = []
        self._output: list[str] = []
        self._seen: dict[int, psutil.Process] = {}
        assert self._process.stderr is not None
        assert self._process.stdout is not None
        streams = ((self._process.stderr, self._lines), (self._process.stdout, self._output))
        self._readers = [threading.Thread(target=self._read, args=pair, daemon=True) for pair in streams]
        for reader in self._readers:
            reader.start()
        self.url = ""

    def __enter__(self) -> Self:
        try:
            self.url = self.wait_for(self._find_url, 30)
        except BaseException:
            self.stop(at_once=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop(at_once=True)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        return "".join(self._lines)

    @property
    def output(self) -> str:
        return "".join(self._output)

    def children(self) -> dict[str, psutil.Process]:
        """The living child processes by what they are: scheduler, nursery, worker; of several workers, the newest."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in sorted(psutil.Process(self.pid).children(recursive=True), key=lambda p: p.create_time()):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    name = child.name()
                    if name == FORKS_PROGRAMS:
                        continue  # it ends by itself, a little later
                    self._seen[child.pid] = child
                    if name.startswith("sl-"):
                        found[name.split("-")[1]] = child
        return found

    def survivors(self) -> list[psutil.Process]:
        """Processes that this server ever had, as far as :meth:`children` saw them, and that still run."""
        known = [*self._seen.values()]
        return [process for process in known if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]

    def wait_ready(self, timeout_s: float = 120) -> Self:
        """Wait until ``/health`` is 200. Raises ``AssertionError`` with the log when that does not happen."""
        self.wait_for(lambda: self.healthy or None, timeout_s)
        self.children()
        return self

    @property
    def healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def wait_for(self, find: Callable[[], T | None], timeout_s: float) -> T:
        """Wait for a result of ``find``. Raises ``AssertionError`` when time runs out or the server ends."""
        deadline = time.monotonic() + timeout_s
        while (found := find()) is None:
            assert self._process.poll() is None, f"the server ended with {self._process.returncode}:\n{self.log}"
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s; the log:\n{self.log}"
            time.sleep(0.05)
        return found

    def wait_for_line(self, text: str, timeout_s: float = 60) -> str:
        """The first log line with ``text`` in it."""
        return self.wait_for(lambda: next((line for line in self._lines if text in line), None), timeout_s)

    def wait_exit(self, timeout_s: float = 30) -> int:
        """Wait for the server's own end. Returns its exit status, negative for a signal."""
        self.children()
        status = self._process.wait(timeout_s)
        for reader in self._readers:
            reader.join(5)
        return status

    def signal(self, number: signal.Signals) -> None:
        self.children()
        self._process.send_signal(number)

    def stop(self, *, at_once: bool = False, timeout_s: float = 60) -> int:
        """End the server with SIGTERM, or ``at_once`` with a second one, which leaves running requests no time.

        Whatever that does not end is killed. Returns the server's exit status.
        """
        self.children()
        if self._process.poll() is None:
            self._process.terminate()
            time.sleep(0.1 if at_once else 0)
        if at_once and self._process.poll() is None:
            self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_AT_ONCE_S if at_once else timeout_s)
        if self._process.poll() is None:
            self._process.kill()
        for process in self.survivors():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return self.wait_exit()

    def _find_url(self) -> str | None:
        match = _LISTENING.search(self.log)
        return match[1] if match else None

    @staticmethod
    def _read(stream: IO[str], lines: list[str]) -> None:
        for line in stream:
            lines.append(line)
