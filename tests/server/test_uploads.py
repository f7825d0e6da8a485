"""Updates that wait do not fill the shared memory, which others need too."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from safelight.protocol.adapters import AdapterState
from safelight.protocol.operations import Operate, Operated
from safelight.protocol.tensor_files import write_header
from safelight.server import uploads

from .stage import Stage, stage

pytestmark = pytest.mark.anyio

BODY = write_header([("a", "F32", [100])]) + bytes(400)


def send(played: Stage) -> asyncio.Task[httpx.Response]:
    headers = {"Content-Type": "application/x-safetensors"}
    return asyncio.create_task(played.client.post("/update_weights_from_tensor", content=BODY, headers=headers))


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
