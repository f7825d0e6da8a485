"""``python -m safelight.tests.fork_server``: has imported what programs of tests need, and forks them from itself.

Standard input is a socket of packets, each a :class:`Program` with four descriptors: the program's standard input,
output and error, and a pipe that takes a line with its process id and, when it has ended, one with its exit status.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import logging
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec

FORKS_PROGRAMS = "forks-programs"
STDIN, STDOUT, STDERR = range(3)
MAX_PACKET = 2**17

PRELOADED = (
    "safelight.server.run",
    "safelight.scheduler.loop",
    "safelight.client.cli",
    "safelight.worker.rank.rank_process",
)


class Program(msgspec.Struct, frozen=True):
    """``entry`` is ``module:function``, which is called without arguments and finds ``arguments`` in ``sys.argv``."""

    entry: str
    arguments: list[str]
    directory: str
    environment: dict[str, str]
    new_session: bool

    def run(self) -> NoReturn:
        """Become the program, and end."""
        os.chdir(self.directory)
        os.environ.clear()
        os.environ.update(self.environment)
        tempfile.tempdir = None  # TMPDIR may be another now
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        module, _, function = self.entry.partition(":")
        sys.argv = [module, *self.arguments]
        if module == "safelight.server.launch":
            _spawn_by_fork()
        _leave(getattr(importlib.import_module(module), function))


def main() -> int:
    from safelight.worker.rank.__main__ import import_rank

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import_rank()
    del sys.modules["peft"]  # the client's side of some tests has a use for it
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()
    program = _fork_programs(socket.socket(fileno=os.dup(STDIN)))
    if program is not None:
        program.run()
    return 0


def _leave(function: Callable[[], int | None]) -> NoReturn:
    """End as a program does after ``function``, but for taking its modules apart, which would take a second."""
    try:
        status = function() or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  # as the interpreter does with what a program does not catch
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def _fork_programs(channel: socket.socket) -> Program | None:
    """Fork until the other end is closed. Returns ``None`` then, and in a forked process what it is to become."""
    with channel:
        while True:
            packet, descriptors, _, _ = socket.recv_fds(channel, MAX_PACKET, 4)
            if not packet:
                return None
            program = msgspec.json.decode(packet, type=Program)
            if os.fork() == 0:
                channel.close()
                _wait_between(program, *descriptors)
                return program
            for descriptor in descriptors:
                os.close(descriptor)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def _wait_between(program: Program, stdin: int, stdout: int, stderr: int, status: int) -> None:
    """Returns in the program's process; the one that was forked for it stays its parent and reports its end."""
    pid = os.fork()
    if pid == 0:
        if program.new_session:
            os.setsid()
        os.close(status)
        for descriptor, standard in ((stdin, STDIN), (stdout, STDOUT), (stderr, STDERR)):
            os.dup2(descriptor, standard)
            os.close(descriptor)
        return
    for descriptor in (STDIN, STDOUT, STDERR, stdin, stdout, stderr):
        os.close(descriptor)
    os.write(status, f"{pid}\n".encode())
    with contextlib.suppress(BrokenPipeError):  # nobody waits any more
        os.write(status, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
    os._exit(0)


def _spawn_by_fork() -> None:
    """Let a server's launcher start its programs as forks of this process as it is now, with their modules imported.

    They are forked by a process of one thread, which the launcher is no longer when it needs them.
    """
    from safelight.server import child_process, nursery

    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        _leave(lambda: _fork_children(its))
    its.close()
    nursery.adopt_orphans()

    def spawn(module: str, stdin: int) -> int:
        socket.send_fds(ours, [module.encode()], [stdin])
        return int(ours.recv(64))

    child_process.spawn = nursery.spawn = spawn


def _fork_children(channel: socket.socket) -> int:
    """Fork a server's programs until its launcher is gone. Returns in each of them, too: with its exit status."""
    from safelight.scheduler.__main__ import main as run_scheduler
    from safelight.worker.rank.__main__ import run_rank
    from safelight.worker.rank.nursery import fork_orphan
    from safelight.worker.rank.nursery import main as run_nursery

    programs = {"scheduler": run_scheduler, "worker.rank": run_rank, "worker.rank.nursery": run_nursery}
    Path("/proc/self/comm").write_text(FORKS_PROGRAMS)
    os.setsid()
    while True:
        packet, descriptors, _, _ = socket.recv_fds(channel, 64, 1)
        if not packet:
            return 0
        (stdin,) = descriptors
        pid = fork_orphan()
        if pid is None:
            channel.close()
            os.dup2(stdin, STDIN)
            os.dup2(STDERR, STDOUT)
            os.close(stdin)
            return programs[packet.decode()]()
        os.close(stdin)
        channel.send(str(pid).encode())


if __name__ == "__main__":
    sys.exit(main())
