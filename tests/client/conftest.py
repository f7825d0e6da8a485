from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from safelight.client import AsyncClient, Client, Event, Generation, Retries
from safelight.tests.live import LiveServer
from safelight.tests.tiny import save

from .played_server import Draw, PlayedServer
from .tensors import Tensors

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


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("flux", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def flux_server(flux: Path) -> Iterator[LiveServer]:
    with LiveServer(flux, ["--threads", "1"]) as server:
        yield server.wait_ready()


@pytest.fixture(scope="session")
def half_server(flux: Path) -> Iterator[LiveServer]:
    """The same model in bfloat16; tests that change it load ``flux`` into it again."""
    with LiveServer(flux, ["--threads", "1", "--dtype", "bfloat16"]) as server:
        yield server.wait_ready()


@pytest.fixture
def trained(flux_server: LiveServer, flux: Path) -> Iterator[Client]:
    """A client of a server that has the weights of ``flux``, and has them again after the test."""
    with Client(flux_server.url) as client:
        yield client
        client.weights.update_from_disk(flux, version="restored")


@pytest.fixture(scope="session")
def own(flux: Path) -> Tensors:
    """The transformer's tensors."""
    return load_file(flux / "transformer" / "diffusion_pytorch_model.safetensors")
