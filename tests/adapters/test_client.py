"""The client's methods for adapters, sync and async."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from safelight.client import AsyncClient, Client, InvalidRequest, Loras, NotFound
from safelight.tests.updates.trainer import DRAWING, Trainer

from .conftest import Adapters

PROMPT = str(DRAWING["prompt"])
CALL = {name: value for name, value in DRAWING.items() if name not in ("prompt", "extra")} | DRAWING["extra"]


def test_a_life_by_the_client(alone: Trainer, adapters: Adapters) -> None:
    with Client(alone.server.url) as client:
        plain = client.generate(PROMPT, **CALL).outputs[0].data
        told = client.set_lora("first", Path(adapters.path("first")), mode="request")
        assert [one.nickname for one in told.loaded] == ["first"]
        own = client.generate(PROMPT, lora=[{"name": "first", "scale": 0.5}], **CALL).outputs[0].data
        assert own != plain
        told = client.set_lora("first", strength=0.5)
        assert "transformer: merge, as a merge would round away" in told.message
        assert told.active["transformer"][0].strength == 0.5
        client.set_lora(["first", "second"], [None, adapters.path("second")], strength=[1.0, 2.0], mode="dynamic")
        merged = client.merge_lora(0.25)
        assert [(one.merged, one.strength) for one in merged.active["transformer"]] == [(True, 0.25)] * 2
        assert not any(one.merged for one in client.unmerge_lora().active["transformer"])
        client.unload_lora("second")
        assert client.unload_lora("first") == Loras((), {}, "first unloaded.")
        assert client.generate(PROMPT, **CALL).outputs[0].data == plain
        with pytest.raises(NotFound, match="'first'"):
            client.generate(PROMPT, lora=[{"name": "first"}], **CALL)
        with pytest.raises(InvalidRequest, match="strength"):
            client.set_lora("first", adapters.path("first"), strength=[1.0, 2.0])


def test_the_async_client_does_the_same(alone: Trainer, adapters: Adapters) -> None:
    async def live() -> list[Loras]:
        async with AsyncClient(alone.server.url) as client:
            return [
                await client.set_lora("first", adapters.path("first"), mode="dynamic"),
                await client.merge_lora(0.5),
                await client.unmerge_lora(),
                await client.loras(),
                await client.unload_lora("first"),
            ]

    told = asyncio.run(live())
    merged = [[(one.mode, one.merged) for ones in each.active.values() for one in ones] for each in told]
    assert merged == [[("dynamic", False)], [("merge", True)], [("merge", False)], [("merge", False)], []]
