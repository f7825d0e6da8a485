"""One run of a server, from the first process's start to the last one's end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ..process.logs import escaped
from ..protocol.child_config import ChildConfig
from ..protocol.errors import Unavailable
from ..protocol.replicas import ModelInfo, Status
from .app import create_app
from .http_server import HttpServer
from .listener import url_of
from .nursery import Nursery
from .scheduler_link import SchedulerLink
from .service import Service
from .supervisor import Supervisor

INTERRUPTED = 130
"""Exit status after a second signal, which ends everything at once."""

_SHARING = {"merged": "share forwards", "interleaved": "take turns", "serial": "run one at a time"}
_STDIN = 0
_LAST_REPLIES_S = 2.0  # for the clients that learn that the server gives up

log = logging.getLogger(__name__)


class Run:
    """One run of a server, from the first process's start to the last one's end."""

    def __init__(
        self,
        child: ChildConfig,
        link: SchedulerLink,
        listener: socket.socket,
        nursery: Nursery | None,
        started: float,
    ) -> None:
        """``started`` is when the server's own process was, by :func:`time.monotonic`."""
        self._config = config = child.config
        self._link = link
        self._listener = listener
        self._started = started
        self._supervisor = Supervisor(child, link, nursery)
        self._service = Service(config, link, Path(child.shared), child.adapters)
        self._http = HttpServer(
            create_app(self._service),
            grace_s=config.grace_s,
            max_connections=config.max_connections,
        )
        self._interrupted = False

    async def until_stopped(self) -> int:
        """Serve until a signal. Returns the exit status; raises ``StartFailed`` when a needed process was lost."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        if self._config.until_stdin_closes:
            watch = functools.partial(_read_to_end, lambda: loop.call_soon_threadsafe(self._on_stdin_closed))
            threading.Thread(target=watch, daemon=True, name="stdin-watch").start()
        serving = asyncio.create_task(self._http.serve(sockets=[self._listener]))
        supervision = asyncio.create_task(self._supervisor.run())
        announcement = asyncio.create_task(self._announce())
        try:
            await asyncio.wait({serving, supervision}, return_when=asyncio.FIRST_COMPLETED)
            if supervision.done():
                await self._give_up(serving)
                supervision.result()
            await serving
            return INTERRUPTED if self._interrupted else 0
        finally:
            self._service.pictures.close()
            for task in (announcement, supervision):
                task.cancel()
            await asyncio.gather(announcement, supervision, return_exceptions=True)
            await self._supervisor.stop(at_once=self._interrupted)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)  # one more of them must not spoil the exit status now

    def _on_signal(self, number: signal.Signals) -> None:
        stopped = Unavailable("The server was stopped.")
        if self._http.should_exit:
            self._interrupted = True
            self._link.abandon_all(stopped)
            self._http.stop(at_once=True)
            return
        log.info("%s: stopping; running requests get %g s to finish", number.name, self._config.grace_s)
        self._http.stop()
        asyncio.get_running_loop().call_later(self._config.grace_s, self._link.abandon_all, stopped)

    def _on_stdin_closed(self) -> None:
        if not self._http.should_exit:
            self._on_signal(signal.SIGTERM)

    async def _announce(self) -> None:
        log.info("listening on %s", url_of(self._listener))
        model = await self._link.status_where(_first_ready)
        ranks = self._config.world_size
        seconds = time.monotonic() - self._started
        fields = {
            "model": model.model, "pipeline": model.pipeline, "device": model.device, "dtype": model.dtype,
            "ranks": ranks, "batching": model.batching.mode, "seconds": round(seconds, 1),
        }  # fmt: skip
        log.info(
            "ready after %.1f s: %s (%s) in %s on %s, %d %s, requests %s (%s)",
            seconds, model.model, model.pipeline, model.dtype, model.device, ranks, "rank" if ranks == 1 else "ranks",
            _SHARING[model.batching.mode], model.batching.reason, extra={"fields": fields},
        )  # fmt: skip
        if self._config.log_format == "text":
            print(f"ready: {url_of(self._listener)} serves {escaped(model.model)}", flush=True)

    async def _give_up(self, serving: asyncio.Task[None]) -> None:
        """End the HTTP server, and tell the clients that wait."""
        self._link.abandon_all(Unavailable("The server lost a process that it needs, and stops."))
        self._http.stop()
        asyncio.get_running_loop().call_later(_LAST_REPLIES_S, lambda: self._http.stop(at_once=True))
        await serving


def _read_to_end(then: Callable[[], object]) -> None:
    """Read standard input, whatever it is, until there is no more; ``then`` is called unless the loop is gone."""
    with contextlib.suppress(OSError):  # a terminal that hangs up
        while os.read(_STDIN, 65536):
            pass
    with contextlib.suppress(RuntimeError):
        then()


def _first_ready(status: Status) -> ModelInfo | None:
    return next((replica.model for replica in status.replicas if replica.state == "ready"), None)
