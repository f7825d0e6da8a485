from __future__ import annotations

import asyncio
from typing import Any

import pytest

from safelight.client import AsyncClient, Client, Event, Generation, Retries

from .played_server import Draw, PlayedServer

QUICK = Retries(count=3, total_s=20.0, jitter=0.0)


def _draw_sync(
    server: PlayedServer, prompt: str, *, stream: bool = False, **arguments: Any
) -> Generation | list[Event]:
    with Client(server.url, retries=QUICK) as client:
        return list(client.stream(prompt, **arguments)) if stream else client.generate(prompt, **arguments)


def _draw_async(
    server: PlayedServer, prompt: str, *, stream: bool = False, **arguments: Any
) -> Generation | list[Event]:
    async def draw() -> Generation | list[Event]:
        async with AsyncClient(server.url, retries=QUICK) as client:
            if stream:
                return [event async for event in client.stream(prompt, **arguments)]
            return await client.generate(prompt, **arguments)

    return asyncio.run(draw())


@pytest.fixture(params=[_draw_sync, _draw_async], ids=["sync", "async"])
def draw(request: pytest.FixtureRequest) -> Draw:
    """One request with the sync and with the async client: every claim is made for both."""
    chosen: Draw = request.param
    return chosen
