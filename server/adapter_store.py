"""Who keeps the server's copies of adapters, and removes those that nothing needs any more."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from ..protocol.errors import ClientGone, QueueFull
from ..protocol.operations import Operate, Settled
from .adapter_files import new_folder
from .scheduler_link import SchedulerLink

MOST_PARTS = 64
"""Parts of adapters that are added or wait for that; their bytes count among the bodies that are being received."""

_RETRY_S = 5.0


class _Line:
    """One at a time, and a bounded number behind it."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._inside = 0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Raises ``QueueFull``."""
        if self._inside >= MOST_PARTS:
            raise QueueFull(
                f"{self._inside} parts of adapters wait already. Ask again in {_RETRY_S:.0f} s.",
                retry_after_s=_RETRY_S,
            )
        self._inside += 1
        try:
            async with self._lock:
                yield
        finally:
            self._inside -= 1


class AdapterStore:
    """``first`` are folders of adapters that the server starts with.

    What replicas need is what the scheduler has said last: they may start again at any time, and read it then.
    """

    def __init__(self, shared: Path, link: SchedulerLink, first: set[str]) -> None:
        self._shared = shared
        self._link = link
        self._first = first
        self._pending: set[Path] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._parts: dict[str, dict[str, Path]] = {}
        self._merging = _Line()
        self._adding = _Line()

    @asynccontextmanager
    async def parts_of(self, update_id: str | None) -> AsyncIterator[None]:
        """A context in which one part of an adapter is added, to those of a begun update or to what is merged.

        The latter waits until a begun update has ended, whose own parts find room. Raises ``QueueFull``.
        """
        async with (self._merging if update_id is None else self._adding).turn():
            yield

    def part(self, update_id: str | None, target: str) -> str | None:
        """Where the parts are that a begun update has for ``target``."""
        folder = self._parts.get(update_id or "", {}).get(target)
        return None if folder is None else str(folder)

    def keep_part(self, update_id: str, target: str, folder: Path) -> None:
        """Keep ``folder``, with all parts that came, until the update ends."""
        self._parts.setdefault(update_id, {})[target] = folder

    def begin_parts(self, update_id: str) -> None:
        """An update has begun, so that every one before it has ended."""
        for other in self._parts.keys() - {update_id}:
            self.end_parts(other)

    def end_parts(self, update_id: str) -> None:
        """A begun update has ended."""
        self._parts.pop(update_id, None)

    @asynccontextmanager
    async def for_a_change(self) -> AsyncIterator[Callable[[], Path]]:
        """A context in which a change of adapters is made; it gives names of new folders for it."""
        own: set[Path] = set()

        def new() -> Path:
            folder = new_folder(self._shared)
            own.add(folder)
            self._pending.add(folder)
            return folder

        try:
            yield new
        except (ClientGone, asyncio.CancelledError):  # what it becomes is not known yet
            task = asyncio.create_task(self._wait_and_remove(own))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            raise
        except BaseException:
            await self._remove(own)
            raise
        self._first = set()  # whatever is needed of them is among what the scheduler tells of, after any change
        await self._remove(own)

    async def _wait_and_remove(self, own: set[Path]) -> None:
        with self._link.submit(Operate(f"settled-{secrets.token_hex(8)}", Settled())) as events:
            await events.operated()
        await self._remove(own)

    async def _remove(self, settled: set[Path]) -> None:
        """Every folder that no replica needs, now that it is known of ``settled`` too."""
        self._pending -= settled
        needed = {one.source.folder for one in self._link.adapters.loaded.values()}
        parts = {folder for folders in self._parts.values() for folder in folders.values()}
        kept = needed | self._first | {str(folder) for folder in self._pending | parts}
        gone = [folder for folder in self._shared.glob("adapter-*") if str(folder) not in kept]
        for folder in gone:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
