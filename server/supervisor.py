"""Starts the scheduler and the workers, and keeps the workers running."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import shutil
from pathlib import Path

from ..protocol.child_config import ChildConfig
from ..protocol.errors import StartFailed
from ..protocol.operations import snapshot_folder
from ..protocol.replicas import ReplicaExited, Status
from ..protocol.self_test import read_result
from .child_process import ChildProcess
from .nursery import Nursery
from .racing import racing
from .rank_processes import RankProcesses
from .scheduler_link import SchedulerLink

_REPORT_S = 2.0  # how long a dead worker's own words may still be on their way through the scheduler
_LONGEST_DELAY_S = 30.0
_SILENCE_S = 10.0  # the least after which a scheduler counts as hanging: on a busy machine, seconds are nothing

log = logging.getLogger(__name__)


class Supervisor:
    """The child processes of one server."""

    def __init__(self, child: ChildConfig, link: SchedulerLink, nursery: Nursery | None = None) -> None:
        """``child`` is the scheduler's; workers get their part of it. ``nursery`` forks them if given."""
        self._child = child
        self._config = child.config
        self._directory = child.directory
        self._link = link
        self._scheduler: ChildProcess | None = None
        self._workers: set[RankProcesses] = set()
        self._nursery = nursery
        self._served = False  # whether any replica was ready once

    async def run(self) -> None:
        """Start everything and supervise it. Ends only by ``StartFailed``, or by being cancelled.

        Raised when the scheduler ends or hangs, and when a replica fails to start before any was ready.
        """
        tasks = [asyncio.create_task(self._watch_scheduler())]
        tasks += [asyncio.create_task(self._keep_replica(number)) for number in range(self._config.replicas)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            done.pop().result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def stop(self, *, at_once: bool = False) -> None:
        """End the workers, then the scheduler, so that what the workers still say is heard."""
        await asyncio.gather(*(worker.stop(at_once=at_once) for worker in self._workers))
        self._workers.clear()
        if self._scheduler is not None:
            await self._scheduler.stop(at_once=at_once)

    async def _watch_scheduler(self) -> None:
        scheduler = await ChildProcess.start("scheduler", self._child)
        self._scheduler = scheduler
        log.info("started scheduler with process id %d", scheduler.pid)
        silence = self._link.silence(max(_SILENCE_S, self._config.stall_timeout_s))
        async with racing(scheduler.wait(), silence) as (ended, hangs):
            if ended.done():
                raise StartFailed(f"The scheduler {ended.result()}, so the server stops; the log above says more.")
            raise StartFailed(f"The scheduler has said nothing for {hangs.result():.0f} s, so the server stops.")

    async def _keep_replica(self, number: int) -> None:
        delay = 0.0
        for start in itertools.count():
            problem, was_ready = await self._live(number, start)
            if not was_ready and not self._served:
                raise StartFailed(problem)
            delay = 0.0 if was_ready else delay
            # RuntimeError: no thread. The next end of the replica, or the server's, removes it.
            with contextlib.suppress(OSError, RuntimeError):
                await asyncio.to_thread(self._remove_snapshot, number)
            self._link.send(ReplicaExited(number, problem))
            log.error("%s It is started again in %g s.", problem, delay)
            await asyncio.sleep(delay)
            delay = min(_LONGEST_DELAY_S, max(1.0, 2 * delay))

    async def _live(self, number: int, start: int) -> tuple[str, bool]:
        """Start a replica and wait for its end. Returns the reason, in a sentence, and whether it was ready."""
        try:
            worker = await self._start_replica(number, start)
        except OSError as error:  # too few descriptors, processes or bytes: there may be more of them later
            return f"Replica {number} could not be started: {error}.", False
        try:
            problem = await self._becomes_ready(worker, number)
            if problem is not None:
                return problem, False
            self._served = True
            return await self._ends(worker, number), True
        finally:
            await worker.stop()
            self._workers.discard(worker)

    def _remove_snapshot(self, number: int) -> None:
        """Remove the snapshot for a replica that did not live to read it."""
        shutil.rmtree(Path(self._child.shared) / snapshot_folder(number), ignore_errors=True)

    async def _start_replica(self, number: int, start: int) -> RankProcesses:
        """Raises ``OSError``."""
        limit = self._config.start_timeout_s
        try:
            async with asyncio.timeout(limit):
                worker = await RankProcesses.start(self._first_rank(number, start), self._start_rank)
        except TimeoutError:
            raise OSError(f"there was no process for it after {limit:g} s; raise --start-timeout-s") from None
        self._workers.add(worker)
        log.info("started worker %d with process id %s", number, ", ".join(map(str, worker.pids)))
        return worker

    def _first_rank(self, number: int, start: int) -> ChildConfig:
        return ChildConfig(
            config=self._config,
            directory=self._directory,
            replica=number,
            start=start,
            self_test=read_result(Path(self._directory)),
        )

    async def _start_rank(self, child: ChildConfig) -> ChildProcess:
        if self._nursery is not None:
            return await self._nursery.fork(child)
        return await ChildProcess.start("worker.rank", child)

    async def _ends(self, worker: RankProcesses, number: int) -> str:
        """Wait until a process of the replica ends, or until its heartbeats stop; says which, in a sentence."""

        def stalled(status: Status) -> str | None:
            replica = next((r for r in status.replicas if r.replica == number and r.pid == worker.pid), None)
            return replica.message if replica is not None and replica.state == "stalled" else None

        async with racing(worker.end_together(), self._link.status_where(stalled)) as (ended, hangs):
            if ended.done():
                return f"The process of replica {number} {ended.result()}."
            return f"Replica {number} hangs: {hangs.result()}."

    async def _becomes_ready(self, worker: RankProcesses, number: int) -> str | None:
        """Wait until the worker is ready; otherwise says in a sentence why it is not."""

        def outcome(status: Status) -> str | None:
            for replica in status.replicas:
                if replica.replica == number and replica.pid == worker.pid and replica.state in ("ready", "failed"):
                    return "" if replica.state == "ready" else replica.message
            return None

        limit = self._config.start_timeout_s
        async with racing(self._link.status_where(outcome), worker.wait(), timeout=limit) as (reported, ended):
            if ended.done():
                await asyncio.wait({reported}, timeout=_REPORT_S)
            if reported.done():
                return reported.result() or None
            if ended.done():
                return f"The process of replica {number} {ended.result()} while it started; the log above says more."
            return (
                f"Replica {number} was not ready after {limit:g} s; raise --start-timeout-s if the model needs longer."
            )
