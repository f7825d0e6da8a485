"""Limits on connections: their number, and the time for which a client may keep one idle.

A server answers as many requests as it has descriptors for connections, and a connection costs its client nothing. So
there is always room for a new one: where there is none, the connection goes that has waited longest for its client.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 20.0
"""Seconds from a request's first byte, or from the connection, to the end of its headers."""

UNREAD_S = 60.0
"""Seconds without a byte taken after which a client reads its answer no more."""

_READ = 256 << 10
_READ_UNTIL_LENGTH_IS_KNOWN = 4 << 10
"""Bytes of a connection that are read, and parsed, before the next one's turn. A chunk costs as much time as a kilobyte
of a body whose length is known, and may have a single byte."""

log = logging.getLogger(__name__)


class Connections:
    """At most ``limit`` connections; over it, the connection that has waited longest for its client is closed."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: set[Connection] = set()
        self._waiting: dict[Connection, None] = {}  # the one that said something last is last
        self._complained_at = float("-inf")

    def __len__(self) -> int:
        return len(self._open)

    def make_room(self) -> bool:
        """True if a connection may be opened; false if all others are working on complete requests."""
        if len(self._open) < self._limit:
            return True
        self.complain(f"all {self._limit} connections are taken (--max-connections); idle ones give way")
        if not self._waiting:
            return False
        oldest = next(iter(self._waiting))
        self.remove(oldest)
        oldest.drop()
        return True

    def add(self, connection: Connection) -> None:
        self._open.add(connection)
        self._waiting[connection] = None

    def heard(self, connection: Connection, *, waits: bool) -> None:
        """Something came or went; ``waits`` says whether the client is the next to speak."""
        self._waiting.pop(connection, None)
        if waits and connection in self._open:
            self._waiting[connection] = None

    def remove(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._waiting.pop(connection, None)

    def complain(self, message: str) -> None:
        """Once a minute: what strangers bring about must not fill the log."""
        if time.monotonic() - self._complained_at > 60:
            self._complained_at = time.monotonic()
            log.warning("%s", message)


class Connection(H11Protocol):
    """uvicorn's protocol with time limits: for headers, and for answers that are not read."""

    def __init__(self, connections: Connections, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._connections = connections
        self._headers_due: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._connections.add(self)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._connections.remove(self)
        self._unset_keepalive_if_required()
        self._forget_headers_due()
        self._forget_unread()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._connections.heard(self, waits=not self._has_whole_request)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_unread()

    def drop(self) -> None:
        """Close at once, whatever is still to be said."""
        self.transport.abort()

    @property
    def _has_request(self) -> bool:
        """True from the end of a request's headers to the end of its reply."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _has_whole_request(self) -> bool:
        return self._has_request and not self.cycle.more_body

    def _watch(self) -> None:
        sized = self._has_request and any(name == b"content-length" for name, _ in self.headers)
        self.transport.max_size = _READ if sized else _READ_UNTIL_LENGTH_IS_KNOWN  # type: ignore[attr-defined]
        self._connections.heard(self, waits=not self._has_whole_request)
        if self._has_request or self.transport.is_closing():
            self._forget_headers_due()
        elif self._headers_due is None and self.timeout_keep_alive_task is None:
            self._headers_due = self.loop.call_later(HEADERS_S, self.drop)

    def _forget_headers_due(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _forget_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _expect_reading(self, before: int) -> None:
        """Drop the connection unless fewer than ``before`` bytes wait to be taken when the time is over."""

        def look() -> None:
            waiting = self.transport.get_write_buffer_size()
            if waiting >= before:
                self.drop()
            else:
                self._expect_reading(waiting)

        self._unread = self.loop.call_later(UNREAD_S, look)
