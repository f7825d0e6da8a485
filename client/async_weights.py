"""The weights of a server for asyncio.

Disk reads, digests and collectives of a trainer's ranks block, so they run in threads; a cancelled call runs to its end
there.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from typing import Concatenate, Generic, ParamSpec, TypeVar

from .begun_update import BegunUpdate
from .results import WeightUpdate
from .weights import Weights

P = ParamSpec("P")
R = TypeVar("R")
W = TypeVar("W")


class _InThreads(Generic[W]):
    def __init__(self, blocking: W) -> None:
        self._blocking = blocking


def _in_a_thread(method: Callable[Concatenate[W, P], R]) -> Callable[Concatenate[_InThreads[W], P], Awaitable[R]]:
    """Make ``method`` awaitable, with the same arguments and documentation."""

    @functools.wraps(method)
    async def call(self: _InThreads[W], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.to_thread(method, self._blocking, *args, **kwargs)

    return call


def _entered_in_threads(
    method: Callable[Concatenate[W, P], AbstractContextManager[BegunUpdate]],
) -> Callable[Concatenate[_InThreads[W], P], AbstractAsyncContextManager[AsyncBegunUpdate]]:
    """Make a context for ``async with``, with the same arguments and documentation."""

    @functools.wraps(method)
    @asynccontextmanager
    async def begin(self: _InThreads[W], /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[AsyncBegunUpdate]:
        context = method(self._blocking, *args, **kwargs)
        entering = asyncio.create_task(asyncio.to_thread(context.__enter__))
        try:
            yield AsyncBegunUpdate(await asyncio.shield(entering))
        except BaseException as error:
            await asyncio.wait([entering])  # a cancelled call begins an update all the same
            if entering.exception() is None:
                await asyncio.to_thread(context.__exit__, type(error), error, error.__traceback__)
            raise
        await asyncio.to_thread(context.__exit__, None, None, None)

    return begin


class AsyncWeights(_InThreads[Weights]):
    """:class:`Weights`, awaited; :attr:`AsyncClient.weights` is one."""

    update = _in_a_thread(Weights.update)
    update_lora = _in_a_thread(Weights.update_lora)
    update_from_disk = _in_a_thread(Weights.update_from_disk)
    verify = _in_a_thread(Weights.verify)
    checksum = _in_a_thread(Weights.checksum)
    version = _in_a_thread(Weights.version)
    begin = _entered_in_threads(Weights.begin)


class AsyncBegunUpdate(_InThreads[BegunUpdate]):
    """:class:`BegunUpdate`, awaited."""

    update = _in_a_thread(BegunUpdate.update)
    update_lora = _in_a_thread(BegunUpdate.update_lora)

    @property
    def result(self) -> WeightUpdate | None:
        return self._blocking.result
