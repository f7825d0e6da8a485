"""One process of ours: started as a program, fed its configuration through a pipe, and ended by its own id."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from typing import Literal, Self

import msgspec

from ..protocol.config import ChildConfig

TERMINATION_S = 5.0
"""Seconds that a process gets between SIGTERM and SIGKILL."""

_STANDARD_ERROR = 2

_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "2000",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}
"""What children get unless the environment says otherwise; docs/decisions/0006 has the measurements.

Threads that wait for work spin for microseconds, then sleep. The heap keeps the memory of a forward for the next one.
"""


def _environment() -> dict[str, str]:
    """Ours under the launcher's own; who chose a wait policy has chosen how long threads spin, too."""
    own = {
        name: value for name, value in _ENVIRONMENT.items() if "OMP" not in name or "OMP_WAIT_POLICY" not in os.environ
    }
    return {**own, **os.environ}


class ChildProcess:
    """A running scheduler or worker. The open pipe to its standard input tells it that the launcher lives."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process

    @classmethod
    async def start(cls, program: Literal["scheduler", "worker"], config: ChildConfig) -> Self:
        process = await asyncio.create_subprocess_exec(
            # -P: what lies in the current folder does not take the place of installed modules.
            *(sys.executable, "-P", "-m", f"{__package__.rpartition('.')[0]}.{program}"),
            stdin=asyncio.subprocess.PIPE,
            stdout=_STANDARD_ERROR,  # the launcher's own standard output is left to its few lines
            env=_environment(),
            start_new_session=True,  # so that Ctrl-C in a terminal reaches the launcher alone
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(config) + b"\n")
        with contextlib.suppress(ConnectionError):  # it is gone already: `wait` tells
            await process.stdin.drain()
        name = program if config.replica is None else f"{program} {config.replica}"
        return cls(name, process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> str:
        """Wait for the end; says how it was, as in "ended with status 1"."""
        status = await self._process.wait()
        return f"was killed by {_signal_name(-status)}" if status < 0 else f"ended with status {status}"

    async def stop(self, *, at_once: bool = False) -> None:
        """End the process and its group: SIGTERM, a short wait, then SIGKILL."""
        if not at_once:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), TERMINATION_S)
        self._signal(signal.SIGKILL)
        await self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
