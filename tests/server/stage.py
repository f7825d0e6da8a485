"""The HTTP side alone, over a real port, with a played scheduler behind it."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from safelight.protocol.config import Config
from safelight.protocol.generation import Generate
from safelight.protocol.messages import FromScheduler
from safelight.protocol.replicas import Status
from safelight.server.app import create_app
from safelight.server.http_server import HttpServer
from safelight.server.listener import listen, url_of
from safelight.server.scheduler_link import SchedulerLink
from safelight.server.service import Service

from .played_scheduler import PlayedScheduler, finished, ready


@dataclass
class Stage:
    client: httpx.AsyncClient
    scheduler: PlayedScheduler
    link: SchedulerLink
    url: str
    http: HttpServer

    async def until(self, condition: Callable[[], object], timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            await asyncio.sleep(0.005)

    async def metric(self, line: str) -> float:
        """The value of the metric that is written as ``line``; 0 when there is none."""
        text = (await self.client.get("/metrics")).text
        return next((float(row.rpartition(" ")[2]) for row in text.splitlines() if row.startswith(line + " ")), 0.0)


@contextlib.asynccontextmanager
async def stage(
    config: Config | None = None,
    *,
    answer: Callable[[Generate], list[FromScheduler]] = finished,
    status: Status | None = None,
    host: str = "127.0.0.1",
) -> AsyncIterator[Stage]:
    """``status`` is what the scheduler says first; a ready replica if not given. The client connects by IPv4."""
    config = config or Config()
    with tempfile.TemporaryDirectory(prefix="stage-") as directory, listen(host, 0, beyond_loopback=True) as listener:
        async with PlayedScheduler(Path(directory), answer) as scheduler, SchedulerLink(scheduler.address) as link:
            http = HttpServer(
                create_app(Service(config, link, Path(directory))), grace_s=0, max_connections=config.max_connections
            )
            serving = asyncio.create_task(http.serve(sockets=[listener]))
            url = url_of(listener).replace("[::1]", "127.0.0.1")
            async with httpx.AsyncClient(base_url=url, timeout=20) as client:
                played = Stage(client, scheduler, link, url, http)
                await played.until(lambda: scheduler.received)
                await scheduler.say(status or ready())
                await played.until(lambda: link.answers)
                yield played
            http.stop()
            await serving
