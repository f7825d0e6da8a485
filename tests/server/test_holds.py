"""Clients learn why a ready server starts nothing, and an operator can end that."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from safelight.protocol.adapters import AdapterState
from safelight.protocol.config import Config
from safelight.protocol.operations import Abort, Leave, Operate, Sleep
from safelight.protocol.replicas import Hold
from safelight.protocol.reports import Operated
from safelight.server.weight_bodies import DEFAULT_GROUP
from safelight.server.weight_transfer import GROUP

from .played_scheduler import IMAGE_MODEL, ready
from .stage import stage

pytestmark = pytest.mark.anyio

HOLD = Hold(operation="Begin", phase="open", held_s=12.5, update_id="abc", ends_in_s=287.5)


async def test_health_information_and_metrics_say_what_holds_back_generation_and_since_when() -> None:
    status = replace(ready(), hold=HOLD, halted="paused", halted_s=3.0, queued_operations=7, queued_bytes=1000)
    reported = {"operation": "Begin", "phase": "open", "held_s": 12.5, "update_id": "abc", "ends_in_s": 287.5}
    async with stage(status=status) as at:
        health = (await at.client.get("/health")).json()
        info = (await at.client.get("/server_info")).json()
        assert health["hold"] == info["hold"] == reported
        assert (health["halted"], health["halted_s"], info["halted_s"]) == ("paused", 3.0, 3.0)
        assert (info["queued_operations"], info["queued_bytes"]) == (7, 1000)
        assert await at.metric('safelight_hold_seconds{operation="Begin"}') == 12.5
        assert await at.metric('safelight_halted_seconds{reason="paused"}') == 3.0
        assert await at.metric("safelight_queued_operations") == 7


async def test_the_scheduler_gets_the_modules_that_a_tag_stands_for_so_that_no_two_tags_overlap() -> None:
    model = replace(IMAGE_MODEL, parameters={"transformer": 10, "vae": 10})
    every = ["transformer", "vae", "caches"]
    wanted = {"weights": every[:2], "kv_cache": ["caches"], "vae": ["vae"], None: every}
    async with stage(status=ready(model)) as at:
        at.scheduler.operated = lambda message: (
            [Operated(message.request_id, {}, "7", [], AdapterState())] if isinstance(message, Operate) else []
        )
        for tag in wanted:
            body = {"tags": tag and [tag, tag]}
            assert (await at.client.post("/release_memory_occupation", json=body)).status_code == 200
        asked = [one.operation for one in at.scheduler.received if isinstance(one, Operate)]
    assert asked == [Sleep(tags) for tags in wanted.values()]


async def test_where_nothing_is_held_back_nothing_says_so() -> None:
    async with stage() as at:
        assert "hold" not in (await at.client.get("/health")).json()
        assert (await at.client.get("/server_info")).json()["hold"] is None


async def test_an_operator_ends_any_begun_update_by_the_route_and_not_both_ways_at_once() -> None:
    async with stage() as at:
        assert (
            await at.client.post("/abort_weights_update", json={"any": True, "update_id": "abc"})
        ).status_code == 400
        assert (await at.client.post("/abort_weights_update", json={})).status_code == 400
        answer = asyncio.create_task(at.client.post("/abort_weights_update", json={"any": True}))
        await at.until(lambda: [one for one in at.scheduler.received if isinstance(one, Operate)])
        (asked,) = [one for one in at.scheduler.received if isinstance(one, Operate)]
        assert asked.operation == Abort(None)
        await at.scheduler.say(Operated(asked.request_id, {}, "7", [], AdapterState()))
        assert (await answer).status_code == 200


async def test_a_begun_update_cannot_ask_to_hold_back_generation_beyond_the_ceiling() -> None:
    async with stage() as at:
        answer = await at.client.post("/begin_weights_update", json={"timeout_s": 86400})
        assert (answer.status_code, answer.json()["error"]["field"]) == (400, "timeout_s")


REFUSED: list[tuple[str, bytes, int, str | None]] = [
    ("/update_weights_from_distributed", b'{"group_name": "g", "names": 3}', 422, "g"),
    (
        "/update_weights_from_distributed",
        b'{"group_name": "g", "names": [], "dtypes": [], "shapes": [], "x": 1}',
        422,
        "g",
    ),
    ("/update_weights_from_distributed", b'{"group_name": null, "names": 3}', 422, DEFAULT_GROUP),
    ("/update_weights_from_distributed", b'{"group_name": 5}', 422, None),
    ("/update_weights_from_distributed", b'{"group_name": "g", "names": [', 422, None),
    ("/update_weights_from_distributed", b'{"group_name": "g"}' + b" " * 16_000_000, 413, None),
    ("/update_weights", b'{"names": 3}', 422, GROUP),
    ("/update_weights", b'{"update_info": {"names": [', 422, GROUP),
    ("/update_weights", b'{"update_info": 3}', 400, GROUP),
    ("/update_weights", b'{"update_info": {"packed": true}}', 400, GROUP),
    ("/update_weights", b'{"update_info": {"is_checkpoint_format": false}}', 400, GROUP),
    ("/update_weights", b" " * 16_000_001, 413, GROUP),
]


@pytest.mark.parametrize(("path", "body", "status", "group"), REFUSED, ids=[str(n) for n in range(len(REFUSED))])
async def test_a_refusal_before_anything_is_announced_ends_the_group_too(
    path: str, body: bytes, status: int, group: str | None
) -> None:
    """All groups, where the body does not tell which one the trainer has begun to broadcast over."""
    async with stage() as at:
        assert (await at.client.post(path, content=body)).status_code == status
        await at.until(lambda: [one for one in at.scheduler.received if isinstance(one, Operate)])
        (asked,) = [one for one in at.scheduler.received if isinstance(one, Operate)]
        assert asked.operation == Leave(group)


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Host": "evil.example"}, {}])
async def test_a_stranger_s_refusal_ends_no_group(headers: dict[str, str]) -> None:
    async with stage(Config(api_key="k")) as at:
        for path in ("/update_weights", "/update_weights_from_distributed"):
            reply = await at.client.post(path, content=b"{", headers=headers)
            assert reply.status_code in (401, 403)
        assert not [one for one in at.scheduler.received if isinstance(one, Operate)]
