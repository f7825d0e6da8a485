"""uvicorn, under our own signals and limits on connections."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from .connections import Connection, Connections
from .descriptors import room_for_connections

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_RETRY_S = 0.5
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\nRetry-After: 1\r\n\r\n"
_IDLE_S = 30  # longer than clients keep idle connections, so that it is the client who closes them


class HttpServer(uvicorn.Server):
    """uvicorn, which leaves the signals to the launcher, and so the exit status too, and connections to us."""

    def __init__(self, app: ASGIApp, *, grace_s: float, max_connections: int = 4096) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            lifespan="off",
            ws="none",
            access_log=False,
            log_config=None,
            log_level="warning",
            server_header=False,
            proxy_headers=False,  # nothing here depends on who the client is
            timeout_keep_alive=_IDLE_S,
            # The launcher ends what still runs after the grace time; the rest is for those replies to be written.
            timeout_graceful_shutdown=math.ceil(grace_s) + 2,
        )
        super().__init__(config)
        self._connections = Connections(room_for_connections(max_connections))
        self._accepting: list[asyncio.Task[None]] = []

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self, *, at_once: bool = False) -> None:
        """Accept nothing more and end when the running requests have; or at once."""
        self.should_exit = True
        self.force_exit = self.force_exit or at_once

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        self._accepting = [asyncio.create_task(self._accept(listener)) for listener in sockets or ()]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for accepting in self._accepting:
            accepting.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        await super().shutdown(sockets)

    async def _accept(self, listener: socket.socket) -> None:
        """In place of asyncio's own loop, which has no bound, and logs thousands of lines where descriptors are out."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._connections.complain(f"no connection can be accepted: {error.strerror}")
                    await asyncio.sleep(_RETRY_S)
                continue  # anything else is the client's, who has gone already
            if self._connections.make_room():
                with contextlib.suppress(OSError):  # it is gone already, or the system has no memory for it
                    await loop.connect_accepted_socket(self._new_connection, accepted)
            else:
                _turn_away(accepted)
                await asyncio.sleep(0)  # for those that are open: accepting does not wait while others come

    def _new_connection(self) -> Connection:
        return Connection(self._connections, self.config, self.server_state, self.lifespan.state)


def _turn_away(accepted: socket.socket) -> None:
    with accepted, contextlib.suppress(OSError):
        accepted.send(_FULL)
