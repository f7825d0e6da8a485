"""The processes of a replica's ranks, with the scheduler's program in place of a worker, which starts much faster."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from safelight.protocol.child_config import ChildConfig
from safelight.protocol.config import Config
from safelight.server.child_process import ChildProcess
from safelight.server.rank_processes import RankProcesses


@pytest.mark.anyio
async def test_a_rank_that_cannot_be_started_leaves_no_brother_behind(tmp_path: Path) -> None:
    started: list[ChildProcess] = []

    async def start_rank(child: ChildConfig) -> ChildProcess:
        if child.rank == 2:
            raise OSError(24, "Too many open files")
        started.append(await ChildProcess.start("scheduler", child))
        return started[-1]

    with pytest.raises(OSError, match="Too many open files"):
        await RankProcesses.start(ChildConfig(config=Config(tp=3), directory=str(tmp_path), replica=0), start_rank)
    assert len(started) == 2
    assert [process.pid for process in started if psutil.pid_exists(process.pid)] == []


@pytest.mark.anyio
async def test_the_end_of_one_rank_is_reported_with_its_number_and_its_status(tmp_path: Path) -> None:
    async def start_rank(child: ChildConfig) -> ChildProcess:
        return await ChildProcess.start("scheduler", child)

    ranks = await RankProcesses.start(ChildConfig(config=Config(tp=2), directory=str(tmp_path), replica=0), start_rank)
    psutil.Process(ranks.pids[1]).kill()
    assert await ranks.wait() == "(rank 1 of 2) was killed by SIGKILL"
    await ranks.stop()
    assert [pid for pid in ranks.pids if psutil.pid_exists(pid)] == []


@pytest.mark.anyio
async def test_ranks_whose_brother_has_died_are_killed_before_its_end_is_reported(tmp_path: Path) -> None:
    """One that waits for it would not end by itself, and would get requests until it did."""

    async def start_rank(child: ChildConfig) -> ChildProcess:
        return await ChildProcess.start("scheduler", child)

    ranks = await RankProcesses.start(ChildConfig(config=Config(tp=3), directory=str(tmp_path), replica=0), start_rank)
    psutil.Process(ranks.pids[0]).suspend()  # it waits for nothing that SIGTERM could end
    psutil.Process(ranks.pids[1]).kill()
    assert await ranks.end_together() == "(rank 1 of 3) was killed by SIGKILL"
    assert [pid for pid in ranks.pids if psutil.pid_exists(pid)] == []
