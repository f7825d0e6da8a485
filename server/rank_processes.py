"""The processes of one replica: a rank each, which live and die together."""

from __future__ import annotations

import asyncio
from typing import Self

from ..protocol.config import ChildConfig, Config
from .child_process import ChildProcess


class RankProcesses:
    """The running ranks of one start of a replica; the first leads and speaks for all."""

    def __init__(self, ranks: list[ChildProcess]) -> None:
        self._ranks = ranks

    @classmethod
    async def start(cls, config: Config, directory: str, replica: int, start: int) -> Self:
        children = (
            ChildConfig(config=config, directory=directory, replica=replica, rank=rank, start=start)
            for rank in range(config.tp)
        )
        return cls([await ChildProcess.start("worker", child) for child in children])

    @property
    def pid(self) -> int:
        """The leader's."""
        return self._ranks[0].pid

    @property
    def pids(self) -> list[int]:
        return [rank.pid for rank in self._ranks]

    async def wait(self) -> str:
        """Wait for the end of any of them; says how it was."""
        ends = [asyncio.create_task(rank.wait()) for rank in self._ranks]
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            which = next(number for number, end in enumerate(ends) if end in done)
            how = ends[which].result()
            return how if len(ends) == 1 else f"(rank {which} of {len(ends)}) {how}"
        finally:
            for end in ends:
                end.cancel()

    async def stop(self, *, at_once: bool = False) -> None:
        await asyncio.gather(*(rank.stop(at_once=at_once) for rank in self._ranks))
