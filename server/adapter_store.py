"""The server's copies of adapters in shared memory, removed once nothing needs them."""

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
"""The limit of adapter parts that are added or wait; their bytes count as bodies that are being received."""

_RETRY_S = 5.0


class _Line:
    """A mutex with a bounded number of waiters."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._inside = 0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Raises ``QueueFull``."""
        if self._inside >= MOST_PARTS:
            raise QueueFull(
                f"{self._inside} parts of adapters wait already. Try again in {_RETRY_S:.0f} s.",
                retry_after_s=_RETRY_S,
            )
        self._inside += 1
        try:
            async with self._lock:
                yield
        finally:
            self._inside -= 1


class AdapterStore:
    """Keeps the folders that replicas need, by the scheduler's last adapter list: a restarted replica reads them again.

    ``first`` are the folders of adapters that the server starts with.
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
        """A context that adds one part of an adapter, to a begun update or to the merged adapter.

        Parts for the merged adapter wait until a begun update has ended, so they do not share its slots. Raises
        ``QueueFull``.
        """
        async with (self._merging if update_id is None else self._adding).turn():
            yield

    def part(self, update_id: str | None, target: str) -> str | None:
        """The folder of the parts of a begun update for ``target``."""
        folder = self._parts.get(update_id or "", {}).get(target)
        return None if folder is None else str(folder)

    def keep_part(self, update_id: str, target: str, folder: Path) -> None:
        """Keep ``folder``, which has all parts so far, until the update ends."""
        self._parts.setdefault(update_id, {})[target] = folder

    def begin_parts(self, update_id: str) -> None:
        """Note that an update has begun, so every earlier one has ended."""
        for other in self._parts.keys() - {update_id}:
            self.end_parts(other)

    def end_parts(self, update_id: str) -> None:
        """Note that a begun update has ended."""
        self._parts.pop(update_id, None)

    @asynccontextmanager
    async def for_a_change(self) -> AsyncIterator[Callable[[], Path]]:
        """A context for a change of adapters; it yields a function that names new folders."""
        own: set[Path] = set()

        def new() -> Path:
            folder = new_folder(self._shared)
            own.add(folder)
            self._pending.add(folder)
            return folder

        try:
            yield new
        except (ClientGone, asyncio.CancelledError):  # the outcome is not known yet
            task = asyncio.create_task(self._wait_and_remove(own))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            raise
        except BaseException:
            await self._remove(own)
            raise
        self._first = set()  # from now on the scheduler's adapter list is authoritative
        await self._remove(own)

    async def _wait_and_remove(self, own: set[Path]) -> None:
        with self._link.submit(Operate(f"settled-{secrets.token_hex(8)}", Settled())) as events:
            await events.operated()
        await self._remove(own)

    async def _remove(self, settled: set[Path]) -> None:
        """Remove every folder that no replica needs; the outcome for ``settled`` is now known."""
        self._pending -= settled
        needed = {one.source.folder for one in self._link.adapters.loaded.values()}
        parts = {folder for folders in self._parts.values() for folder in folders.values()}
        kept = needed | self._first | {str(folder) for folder in self._pending | parts}
        gone = [folder for folder in self._shared.glob("adapter-*") if str(folder) not in kept]
        for folder in gone:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
