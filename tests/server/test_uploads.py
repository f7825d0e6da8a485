"""Updates that wait do not fill memory, which others need too."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from safelight.formats.tensor_files import write_header
from safelight.protocol.adapters import AdapterState
from safelight.protocol.operations import Operate
from safelight.protocol.reports import Operated
from safelight.server import adapter_store, uploads

from .stage import Stage, stage

pytestmark = pytest.mark.anyio

PATH = "/update_weights_from_tensor"
BODY = write_header([("a", "F32", [100])]) + bytes(400)


def send(played: Stage) -> asyncio.Task[httpx.Response]:
    headers = {"Content-Type": "application/x-safetensors"}
    return asyncio.create_task(played.client.post(PATH, content=BODY, headers=headers))


def asked(played: Stage) -> list[Operate]:
    return [message for message in played.scheduler.received if isinstance(message, Operate)]


async def test_safetensors_bodies_of_updates_that_wait_take_half_of_the_shared_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(uploads, "half_of", lambda memory: 2 * len(BODY))
    async with stage() as played:
        waiting = [send(played) for _ in range(2)]
        await played.until(lambda: len(asked(played)) == 2, 60)
        refused = await send(played)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        for one in asked(played):
            await played.scheduler.say(Operated(one.request_id, {}, "7", [], AdapterState()))
        assert [(await one).status_code for one in waiting] == [200, 200]
        again = send(played)
        await played.until(lambda: len(asked(played)) == 3, 60)
        await played.scheduler.say(Operated(asked(played)[-1].request_id, {}, "7", [], AdapterState()))
        assert (await again).status_code == 200


async def test_one_body_alone_may_take_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "half_of", lambda memory: 1)
    async with stage() as played:
        answer = send(played)
        await played.until(lambda: asked(played), 60)
        await played.scheduler.say(Operated(asked(played)[0].request_id, {}, "7", [], AdapterState()))
        assert (await answer).status_code == 200


async def test_parts_of_adapters_that_wait_are_bounded_and_those_of_a_begun_update_find_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapter_store, "MOST_PARTS", 2)
    body = {"serialized_named_tensors": ["AAAA"], "weight_update_mode": "lora_merge"}
    async with stage() as played:
        waiting = [asyncio.create_task(played.client.post(PATH, json=body)) for _ in range(3)]
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=60)
        assert [one.result().status_code for one in done] == [429]
        part = asyncio.create_task(played.client.post(PATH, json=body | {"update_id": "u"}))
        await played.until(lambda: len(asked(played)) == 2, 60)
        for task in (*waiting, part):
            task.cancel()
        await asyncio.gather(*waiting, part, return_exceptions=True)
