"""The client's methods for adapters, sync and async."""

from __future__ import annotations

import asyncio
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file

from safelight.client import AsyncClient, Client, InvalidRequest, Loras, NotFound, OffPolicy
from safelight.protocol.adapters import ADAPTER_FILE, Drawn, WantedMode
from safelight.tests.updates.trainer import DRAWING, Trainer, transformer

from .conftest import Adapters

PROMPT = str(DRAWING["prompt"])
CALL = {name: value for name, value in DRAWING.items() if name not in ("prompt", "extra")} | DRAWING["extra"]


def test_a_life_by_the_client(alone: Trainer, adapters: Adapters) -> None:
    with Client(alone.server.url) as client:
        plain = client.generate(PROMPT, **CALL).outputs[0].data
        reported = client.set_lora("first", Path(adapters.path("first")), mode="request")
        assert [one.nickname for one in reported.loaded] == ["first"]
        own = client.generate(PROMPT, lora=[{"name": "first", "scale": 0.5}], **CALL).outputs[0].data
        assert own != plain
        reported = client.set_lora("first", strength=0.5)
        assert "transformer: merge, as a merge would round away" in reported.message
        assert reported.active["transformer"][0].strength == 0.5
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


@pytest.mark.parametrize("mode", ["merge", "dynamic"])
def test_every_reply_names_the_adapter_that_a_trainers_samples_were_drawn_with(
    mode: WantedMode, alone: Trainer, adapters: Adapters
) -> None:
    own = transformer(alone.directory)
    rollout = {name: value for name, value in CALL.items() if name not in ("output_format", "num_inference_steps")}
    with Client(alone.server.url) as client:
        client.set_lora("first", adapters.path("first"), strength=0.5, mode=mode)
        named = [Drawn("first", "transformer", 0.5, mode)]
        assert [*client.generate(PROMPT, **CALL).adapters] == named
        assert client.rollout(PROMPT, steps=2, **rollout)[0].adapters == named
        (active,) = client.info()["adapters"]["transformer"]
        assert (active["nickname"], active["mode"], active["merged"]) == ("first", mode, mode == "merge")
        with pytest.warns(OffPolicy, match="first .*transformer, strength 0.5.*off-policy") as warned:
            client.weights.update(own)
        assert warned[0].filename == __file__
        with pytest.warns(OffPolicy), client.weights.begin() as begun:
            begun.update(own)
        with pytest.warns(OffPolicy):
            client.weights.update_from_disk(alone.directory)
        client.set_lora("second", adapters.path("second"), mode="request")
        mine = client.generate(PROMPT, lora=[{"name": "second", "scale": 2.0}], **CALL)
        assert [*mine.adapters] == (named if mode == "merge" else []) + [Drawn("second", "transformer", 2.0, "request")]
        client.unload_lora("second")
        client.unload_lora("first")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            client.weights.update_lora(load_file(Path(adapters.path("first")) / ADAPTER_FILE))
        assert [one.nickname for one in client.generate(PROMPT, **CALL).adapters] == ["lora_merge:transformer"]
        client.unload_lora("lora_merge:transformer")
        assert (client.info()["adapters"], client.generate(PROMPT, **CALL).adapters) == ({}, ())


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

    reported = asyncio.run(live())
    merged = [[(one.mode, one.merged) for ones in each.active.values() for one in ones] for each in reported]
    assert merged == [[("dynamic", False)], [("merge", True)], [("merge", False)], [("merge", False)], []]
