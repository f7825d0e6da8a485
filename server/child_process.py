"""A child process: started as a program or forked by the nursery, configured through a pipe, ended by its id."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import sys
import threading
from typing import Literal, Self

import msgspec

from ..protocol.child_config import ChildConfig

TERMINATION_S = 5.0
"""Seconds that a process gets between SIGTERM and SIGKILL."""

_STDIN, _STDOUT, _STDERR = range(3)

_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
"""Environment of child processes, unless the launcher's own sets it; docs/decisions/0006 has the measurements.

The heap keeps the memory of a forward for the next one.
Libraries that ask for a GPU while they are imported do not open it: a process that has cannot fork workers.
"""


def child_environment() -> dict[str, str]:
    """Ours under the launcher's own."""
    return {name: value for name, value in {**_ENVIRONMENT, **os.environ}.items() if name != "SAFELIGHT_API_KEY"}


def spawn(module: str, stdin: int) -> int:
    """Start the program ``safelight.<module>`` with the descriptor ``stdin``. Returns its process id.

    It leads a session of its own, so that Ctrl-C in a terminal reaches the launcher alone, and writes its standard
    output to standard error: the launcher's own standard output is left to its few lines.
    """
    # -P: what lies in the current folder does not take the place of installed modules.
    command = [sys.executable, "-P", "-m", f"{__package__.rpartition('.')[0]}.{module}"]
    redirected = [(os.POSIX_SPAWN_DUP2, stdin, _STDIN), (os.POSIX_SPAWN_DUP2, _STDERR, _STDOUT)]
    return os.posix_spawn(sys.executable, command, child_environment(), file_actions=redirected, setsid=True)


class ChildProcess:
    """A running scheduler, nursery or worker: a child of this process that leads a process group.

    ``lifeline`` is the end that we hold of the pipe or socket to its standard input; when it closes, the child ends.
    """

    def __init__(self, name: str, pid: int, lifeline: int) -> None:
        """Raises ``OSError`` where there is no thread to wait for the process, which is killed then."""
        self.name = name
        self.pid = pid
        self._lifeline: int | None = lifeline
        self._loop = asyncio.get_running_loop()
        self._status: asyncio.Future[int] = self._loop.create_future()
        try:
            threading.Thread(target=self._reap, daemon=True, name=f"reap-{pid}").start()
        except RuntimeError as error:  # the system has no more threads for this user or container
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise OSError(errno.EAGAIN, str(error)) from None

    @classmethod
    async def start(cls, program: Literal["scheduler", "worker.rank"], config: ChildConfig) -> Self:
        """Start ``program`` and give it its configuration. Raises ``OSError``."""
        stdin, lifeline = os.pipe()
        try:
            pid = spawn(program, stdin)
        except OSError:
            os.close(lifeline)
            raise
        finally:
            os.close(stdin)
        try:
            process = cls(program if config.replica is None else f"worker {config.replica}", pid, lifeline)
        except OSError:
            os.close(lifeline)
            raise
        await process.configure(config)
        return process

    async def configure(self, config: ChildConfig) -> None:
        """Write ``config`` to the process's standard input, which stays open.

        Raises ``OSError`` where there is no thread to do so; the process is killed then.
        """
        assert self._lifeline is not None, "it was not stopped"
        try:
            await asyncio.to_thread(_write, self._lifeline, msgspec.json.encode(config.without_key()) + b"\n")
        except RuntimeError as error:
            await self.stop(at_once=True)
            raise OSError(errno.EAGAIN, str(error)) from None

    @property
    def running(self) -> bool:
        return not self._status.done()

    async def wait(self) -> str:
        """Wait for the end; return a description such as "ended with status 1"."""
        status = await asyncio.shield(self._status)
        return f"was killed by {_signal_name(-status)}" if status < 0 else f"ended with status {status}"

    async def stop(self, *, at_once: bool = False) -> None:
        """End the process and its group: SIGTERM, a short wait, then SIGKILL."""
        if not at_once:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._status), TERMINATION_S)
        self._signal(signal.SIGKILL)
        await asyncio.shield(self._status)
        if self._lifeline is not None:  # two who stop it at once close it once
            lifeline, self._lifeline = self._lifeline, None
            os.close(lifeline)

    def _signal(self, number: signal.Signals) -> None:
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def _reap(self) -> None:
        _, status = os.waitpid(self.pid, 0)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._status.set_result, os.waitstatus_to_exitcode(status))


def _write(descriptor: int, data: bytes) -> None:
    """Write all of ``data``; a reader that is gone is noticed by its end."""
    with contextlib.suppress(BrokenPipeError):
        while data:
            data = data[os.write(descriptor, data) :]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
