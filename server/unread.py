"""Bound results that clients have not taken yet: replies, unread events, and rollouts' files in shared memory."""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..protocol.errors import ClientGone, QueueFull
from ..protocol.generation import Failed, Output, Result
from .rollout_reply import Piece, in_parts
from .subscription import Subscription

KEPT_S = 120.0
"""Seconds that a file in shared memory is kept for a client that does not fetch it."""

PATIENCE_S = 30.0
"""Seconds for which a file is kept even where there is no room."""

TAKEN_S = 60.0
"""Seconds in all in which a client takes a reply, and so many more as its bytes take at ``SLOWEST_BYTES_S``."""

SLOWEST_BYTES_S = 100_000

_RETRY_S = 5.0

AT_ONCE = 64 * 1024
"""Bytes that asyncio's transports keep for a client before they pause who writes."""

_FILES = "rollout-*.safetensors"

log = logging.getLogger(__name__)


class Unread:
    """Bounds the bytes of all of them. A client that has read its file has removed it."""

    def __init__(self, shared: Path, most_bytes: int) -> None:
        self._shared = shared
        self._most = most_bytes
        self._sending = 0
        self._streams: set[Subscription] = set()

    def make_room(self, mine: list[Path] | None = None) -> None:
        """Remove files that nobody fetches: all after ``KEPT_S``, and while there are too many bytes, oldest first.

        Raises ``QueueFull`` where that is not enough; then ``mine``, which were just made, are gone too.
        """
        found = sorted(self._swept())
        waiting = self._sending + sum(stream.unread_bytes for stream in self._streams)
        total = waiting + sum(size for _, size, _ in found)
        for made_at, size, file in found:
            if total <= self._most or time.time() - made_at < PATIENCE_S:
                break
            file.unlink(missing_ok=True)
            log.warning("removed %s, as nobody has fetched it and there is no room for others", file.name)
            total -= size
        if total > self._most:
            drop(mine or [])
            raise QueueFull(
                f"Replies and rollouts of {total >> 20} MB wait for their clients to take them, and {self._most >> 20} "
                f"MB may (--max-unread-mb). Ask again in {_RETRY_S:.0f} s.",
                retry_after_s=_RETRY_S,
            )

    def sweep(self) -> None:
        """Remove the files that clients have had time to fetch."""
        for _ in self._swept():
            pass

    def _swept(self) -> Iterator[tuple[float, int, Path]]:
        """When each file was made, its bytes, and its path; those that clients have had time to fetch are removed."""
        for made_at, size, file in self._files():
            if time.time() - made_at > KEPT_S:
                file.unlink(missing_ok=True)
            else:
                yield made_at, size, file

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self._shared) as entries:
            for entry in entries:
                if fnmatch.fnmatchcase(entry.name, _FILES):
                    with contextlib.suppress(FileNotFoundError):
                        found = entry.stat()
                        yield found.st_mtime, found.st_size, Path(entry.path)

    @contextlib.contextmanager
    def counting(self, events: Subscription) -> Iterator[Taker]:
        """Count what a stream's client has yet to read of ``events``; a result for which there is no room fails."""
        self._streams.add(events)
        events.admit = self._admit
        try:
            yield Taker(self)
        finally:
            self._streams.remove(events)

    def _admit(self, result: Result) -> Result | Failed:
        try:
            self.make_room()
        except QueueFull as error:
            return Failed(result.request_id, error.info())
        except OSError as error:  # the loop that receives every reply calls this
            log.error("a result is kept without a look at the room, as the rollouts' files cannot be read: %s", error)
        return result

    @contextlib.contextmanager
    def sending(self, size: int) -> Iterator[None]:
        """Count so many bytes within."""
        self._sending += size
        try:
            yield
        finally:
            self._sending -= size


class Taker:
    """The client of one reply, which it takes in one part or several, and the time that it has left to do so."""

    def __init__(self, unread: Unread) -> None:
        self._unread = unread
        self._left_s = TAKEN_S

    @contextlib.asynccontextmanager
    async def sending(self, size: int) -> AsyncIterator[None]:
        """Send so many bytes within. Raises ``ClientGone`` where the client takes too long."""
        began, own_s = time.monotonic(), size / SLOWEST_BYTES_S
        with self._unread.sending(size):
            try:
                async with asyncio.timeout(self._left_s + own_s):
                    yield
            except TimeoutError:
                rate = f"{SLOWEST_BYTES_S / 1e6:g} MB a second"
                raise ClientGone(f"The client took less than {rate} of its reply.") from None
        self._left_s = max(0.0, self._left_s - max(0.0, time.monotonic() - began - own_s))


class UnreadReply(StreamingResponse):
    """A reply whose bytes count until its client has taken them. Its files go with one that goes away before."""

    def __init__(
        self,
        found: list[Piece],
        unread: Unread,
        media_type: str,
        *,
        headers: Mapping[str, str] | None = None,
        files: Sequence[Path] = (),
    ) -> None:
        self._size = sum(map(len, found))
        all_headers = {**(headers or {}), "content-length": str(self._size)}
        super().__init__(self._each(found), media_type=media_type, headers=all_headers)
        self._found = found
        self._unread = unread
        self._files = list(files)
        self._taken = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with Taker(self._unread).sending(self._size):
            if self._size <= AT_ONCE and not self._files:
                await self._send_at_once(send)
                return
            try:
                await super().__call__(scope, receive, send)
            finally:
                if not self._taken:
                    drop(self._files)

    async def _send_at_once(self, send: Send) -> None:
        """The connection takes so few bytes without waiting, so nobody has to watch the client meanwhile."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": b"".join(self._found)})

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
