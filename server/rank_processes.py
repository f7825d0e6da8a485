"""The processes of one replica: a rank each, which live and die together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Self

import msgspec

from ..protocol.child_config import ChildConfig
from .child_process import ChildProcess
from .racing import racing

StartRank = Callable[[ChildConfig], Awaitable[ChildProcess]]


class RankProcesses:
    """The running ranks of one start of a replica; the first leads and speaks for all."""

    def __init__(self, ranks: list[ChildProcess]) -> None:
        self._ranks = ranks

    @classmethod
    async def start(cls, first: ChildConfig, start_rank: StartRank) -> Self:
        """Start every rank by ``start_rank``, with the configuration of the ``first`` but for its number.

        Raises the ``OSError`` of a rank that cannot be started, when the ranks before it have ended.
        """
        ranks: list[ChildProcess] = []
        try:
            for rank in range(first.config.replica_ranks):
                ranks.append(await start_rank(msgspec.structs.replace(first, rank=rank)))
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
        async with racing(*(rank.wait() for rank in self._ranks)) as ends:
            which = next(number for number, end in enumerate(ends) if end.done())
            how = ends[which].result()
            return how if len(ends) == 1 else f"(rank {which} of {len(ends)}) {how}"

    async def end_together(self) -> str:
        """Wait for the end of any of them, and end the others at once: all that they could do is wait for it.

        Says how the first one ended.
        """
        how = await self.wait()
        await self.stop(at_once=True)
        return how

    async def stop(self, *, at_once: bool = False) -> None:
        await asyncio.gather(*(rank.stop(at_once=at_once) for rank in self._ranks))
