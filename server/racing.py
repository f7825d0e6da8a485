"""Wait for the first of several pieces of work, and end the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")


@asynccontextmanager
async def racing(*work: Coroutine[Any, Any, T], timeout: float | None = None) -> AsyncIterator[list[asyncio.Task[T]]]:
    """Yield the tasks once one of them is done, or after ``timeout`` seconds; the others are cancelled on leaving."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
