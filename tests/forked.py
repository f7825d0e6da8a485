"""Programs of ours that tests run: forked from one process for each of pytest's, which has imported torch for all.

A :class:`Forked` is a :class:`subprocess.Popen` but for how its process begins. Tests of a program's very start, or of
what the environment does to libraries as they are imported, use :mod:`subprocess`.
"""

from __future__ import annotations

import functools
import os
import select
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from safelight.server.child_process import child_environment
from safelight.tests.fork_server import Program


class Forked(subprocess.Popen[Any]):
    """``entry``, a ``module:function`` without arguments, called with ``arguments`` as the command line.

    ``options`` are those of ``Popen``, with text mode as the default.
    """

    def __init__(self, entry: str, arguments: Sequence[object] = (), **options: Any) -> None:
        super().__init__([entry, *map(str, arguments)], **{"text": True, **options})

    def _execute_child(self, args: list[str], *rest: Any) -> None:
        """Called by ``Popen.__init__``, whose descriptors it gets; -1 where the standard one is inherited."""
        cwd, environment, new_session = rest[4], rest[5], rest[20]
        given = [rest[9], rest[12], rest[14]]  # its ends of the pipes
        program = Program(args[0], args[1:], str(cwd or Path.cwd()), dict(environment or os.environ), bool(new_session))
        read, write = os.pipe()
        standard = [end if end != -1 else number for number, end in enumerate(given)]
        socket.send_fds(_fork_server(), [msgspec.json.encode(program)], [*standard, write])
        os.close(write)
        self._close_pipe_fds(*rest[9:15])  # type: ignore[attr-defined]
        self._report = os.fdopen(read, "rb", buffering=0)
        self.pid = int(self._line())
        self._child_created = True

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            byte = self._report.read(1)
            assert byte, f"the process that forks programs could not fork {self.args}"
            line += byte
        return line

    def _wait(self, timeout: float | None = None) -> int:  # called by ``Popen.wait``
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self._line())
            self._report.close()
        return self.returncode

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:  # called by ``Popen.poll``
        try:
            return self._wait(0)
        except subprocess.TimeoutExpired:
            return None


def run(
    entry: str, arguments: Sequence[object] = (), *, timeout: float = 120, **options: Any
) -> subprocess.CompletedProcess[str]:
    """The program to its end, with all that it wrote. Raises ``TimeoutExpired`` and kills it when it takes longer."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Forked(entry, arguments, **(pipes | options)) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@functools.cache
def _fork_server() -> socket.socket:
    """The channel to this process's fork server, which ends with it."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        command = [sys.executable, "-P", "-m", "safelight.tests.fork_server"]
        subprocess.Popen(command, stdin=its.fileno(), start_new_session=True, env=child_environment())
    return ours
