"""The launcher's side of the nursery: one process that has imported what workers need, and forks them."""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import sys
from dataclasses import dataclass, replace

from ..protocol.child_config import ChildConfig
from .child_process import ChildProcess, spawn

_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


FORK_S = 10.0
"""Seconds in which a nursery that has forked before has to do it again; its first fork waits for its imports."""


@dataclass(frozen=True, slots=True)
class _Running:
    process: ChildProcess
    channel: socket.socket
    has_forked: bool = False


class Nursery:
    """Forks workers from ``python -m safelight.worker.rank.nursery``, which is started again when it was lost.

    A worker is this process's child like any other: it outlives the nursery, and its exit status is known. The first
    nursery begins with its imports at once. Raises ``OSError``.
    """

    AVAILABLE = sys.platform == "linux"
    """True if a process can adopt its descendants' orphans: on Linux."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._running: _Running | None = None
        self._start_unless_running()

    async def fork(self, config: ChildConfig) -> ChildProcess:
        """A new worker with its configuration. Raises ``OSError``, also where the nursery ends or hangs instead."""
        async with self._turn:
            running = self._start_unless_running()
            stdin, lifeline = os.pipe()
            try:
                worker = ChildProcess(f"worker {config.replica}", await _forked(running, stdin), lifeline)
                self._running = replace(running, has_forked=True)
            except BaseException:
                os.close(lifeline)
                await self.stop()
                raise
            finally:
                os.close(stdin)
        await worker.configure(config)
        return worker

    async def stop(self) -> None:
        """End the nursery, and none of the workers that it forked."""
        if self._running is not None:
            running, self._running = self._running, None
            running.channel.detach()  # its descriptor is the process's lifeline
            await running.process.stop(at_once=True)

    def _start_unless_running(self) -> _Running:
        if self._running is None or not self._running.process.running:
            adopt_orphans()
            ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.setblocking(False)
            with its:
                pid = spawn("worker.rank.nursery", its.fileno())
            self._running = _Running(ChildProcess("nursery", pid, ours.fileno()), ours)
        return self._running


async def _forked(running: _Running, stdin: int) -> int:
    """The process id of a new worker with the standard input ``stdin``."""
    try:
        async with asyncio.timeout(FORK_S if running.has_forked else None):
            socket.send_fds(running.channel, [b"fork"], [stdin])
            answer = await asyncio.get_running_loop().sock_recv(running.channel, 64)
    except TimeoutError:
        raise ChildProcessError(f"the process that forks workers did not do so within {FORK_S:g} s") from None
    if not answer:
        raise ChildProcessError(f"the process that forks workers {await running.process.wait()}")
    return int(answer)


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent has ended. Raises ``OSError``."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "this process cannot adopt the workers that are forked for it")
