"""The processes of one replica: a rank each, which live and die together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Self

from ..protocol.config import ChildConfig, Config
from .child_process import ChildProcess

StartRank = Callable[[ChildConfig], Awaitable[ChildProcess]]


class RankProcesses:
    """The running ranks of one start of a replica; the first leads and speaks for all."""

    def __init__(self, ranks: list[ChildProcess]) -> None:
        self._ranks = ranks

    @classmethod
    async def start(cls, config: Config, directory: str, replica: int, start: int, start_rank: StartRank) -> Self:
        """Start every rank by ``start_rank``, or none: raises its ``OSError`` when the ranks before it have ended."""
        ranks: list[ChildProcess] = []
        try:
            for rank in range(config.tp):
                child = ChildConfig(config=config, directory=directory, replica=replica, rank=rank, start=start)
                ranks.append(await start_rank(child))
        except BaseException:
            await cls(ranks).stop(at_once=True)
            raise
        return cls(ranks)

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
