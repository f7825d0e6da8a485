"""The async client's weights are the blocking client's, and leave its loop free."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path

import pytest

from safelight.client import AsyncClient, AsyncWeights, Client, TensorsDiffer, Weights

from .tensors import SEVERAL, Tensors, plus


@pytest.mark.parametrize("name", ["update", "update_from_disk", "verify", "checksum", "version", "begin"])
def test_both_clients_take_the_same_arguments(name: str) -> None:
    awaited, blocking = (inspect.signature(getattr(kind, name)) for kind in (AsyncWeights, Weights))
    assert awaited.parameters == blocking.parameters
    assert getattr(AsyncWeights, name).__doc__


def test_an_awaited_update_serves_and_the_loop_goes_on_meanwhile(trained: Client, own: Tensors, flux: Path) -> None:
    async def train() -> int:
        turns = 0
        async with AsyncClient(trained.base_url) as client:
            task = asyncio.ensure_future(client.weights.update(own, version="awaited", bucket_bytes=SEVERAL))
            while not task.done():
                await asyncio.sleep(0)
                turns += 1
            assert (await task) is not None
            assert await client.weights.version() == "awaited"
            assert await client.weights.checksum() == trained.weights.checksum()
            await client.weights.verify(own)
            await client.weights.update_from_disk(flux)
        return turns

    assert asyncio.run(train()) > 10


def test_an_awaited_context_commits_and_verifies(trained: Client, own: Tensors) -> None:
    async def train() -> None:
        async with AsyncClient(trained.base_url) as client:
            async with client.weights.begin("parts") as begun:
                await begun.update(plus(own, 1))
            assert begun.result is not None
            assert begun.result.weight_version == trained.weights.version() == "parts"
            with pytest.raises(TensorsDiffer):
                await client.weights.verify(own)

    asyncio.run(train())


def test_an_exception_in_an_awaited_context_leaves_every_byte(trained: Client, own: Tensors) -> None:
    before = trained.weights.checksum()

    async def train() -> None:
        async with AsyncClient(trained.base_url) as client, client.weights.begin() as begun:
            await begun.update(plus(own, 1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(train())
    assert trained.weights.checksum() == before


@pytest.mark.parametrize("after_s", [0.0, 0.01, 0.3])
def test_a_context_that_is_cancelled_leaves_no_open_update(after_s: float, trained: Client, own: Tensors) -> None:
    before = trained.weights.checksum()

    async def hold(client: AsyncClient) -> None:
        async with client.weights.begin() as begun:
            await begun.update(plus(own, 1))
            await asyncio.sleep(60)

    async def train() -> None:
        async with AsyncClient(trained.base_url) as client:
            task = asyncio.create_task(hold(client))
            await asyncio.sleep(after_s)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(train())
    assert trained.weights.checksum() == before
    trained.weights.update(own)  # a conflict, while an update is open
