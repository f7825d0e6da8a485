"""Rollouts that are made and that nobody has taken yet: replies on their way, and files in shared memory."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..protocol.errors import QueueFull
from ..protocol.messages import Output
from .rollout_reply import MEDIA_TYPE, Piece, in_parts

KEPT_S = 120.0
"""Seconds that a file in shared memory is kept for a client that does not fetch it."""

PATIENCE_S = 30.0
"""Seconds for which a file is kept even where there is no room."""

_RETRY_S = 5.0

_FILES = "rollout-*.safetensors"

log = logging.getLogger(__name__)


class Unread:
    """Bounds the bytes of all of them. A client that has read its file has removed it."""

    def __init__(self, shared: Path, most_bytes: int) -> None:
        self._shared = shared
        self._most = most_bytes
        self._sending = 0

    def make_room(self, mine: list[Path] | None = None) -> None:
        """Remove files that nobody fetches: all after ``KEPT_S``, and while there are too many bytes, oldest first.

        Raises ``QueueFull`` where that is not enough; then ``mine``, which were just made, are gone too.
        """
        self.sweep()
        found = sorted(self._files())
        total = self._sending + sum(size for _, size, _ in found)
        for made_at, size, file in found:
            if total <= self._most or time.time() - made_at < PATIENCE_S:
                break
            file.unlink(missing_ok=True)
            log.warning("removed %s, as nobody has fetched it and there is no room for others", file.name)
            total -= size
        if total > self._most:
            drop(mine or [])
            raise QueueFull(
                f"Finished rollouts of {total >> 20} MB wait for their clients to take them, and {self._most >> 20} MB "
                f"may (--max-unread-mb). Ask again in {_RETRY_S:.0f} s.",
                retry_after_s=_RETRY_S,
            )

    def sweep(self) -> None:
        """Remove the files that clients have had time to fetch."""
        drop([file for made_at, _, file in self._files() if time.time() - made_at > KEPT_S])

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """When each file was made, its bytes, and its path."""
        for file in self._shared.glob(_FILES):
            with contextlib.suppress(FileNotFoundError):
                found = file.stat()
                yield found.st_mtime, found.st_size, file

    @contextlib.contextmanager
    def sending(self, size: int) -> Iterator[None]:
        self._sending += size
        try:
            yield
        finally:
            self._sending -= size


class UnreadReply(StreamingResponse):
    """A rollout's reply. Its files go with a client that goes away before it has taken it."""

    def __init__(self, found: list[Piece], unread: Unread, files: list[Path]) -> None:
        self._size = sum(map(len, found))
        super().__init__(self._each(found), media_type=MEDIA_TYPE, headers={"content-length": str(self._size)})
        self._unread = unread
        self._files = files
        self._taken = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._unread.sending(self._size):
            try:
                await super().__call__(scope, receive, send)
            finally:
                if not self._taken:
                    drop(self._files)

    async def _each(self, found: list[Piece]) -> AsyncIterator[Piece]:
        """Off no thread, as nothing is computed or copied; each part waits until the connection takes it."""
        for part in in_parts(found):
            yield part
        self._taken = True


def files_of(outputs: list[Output]) -> list[Path]:
    """The files in shared memory that a result's rollouts lie in."""
    rolled_out = [output.rolled_out for output in outputs if output.rolled_out is not None]
    return [Path(one.file) for one in rolled_out if one.file is not None]


def drop(files: list[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
