"""Whoever asks is told why a ready server starts nothing, and an operator can end that."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from safelight.protocol.adapters import AdapterState
from safelight.protocol.messages import Hold
from safelight.protocol.operations import Abort, Leave, Operate, Operated

from .played_scheduler import ready
from .stage import stage

pytestmark = pytest.mark.anyio

HOLD = Hold(operation="Begin", phase="open", held_s=12.5, update_id="abc", ends_in_s=287.5)


async def test_health_information_and_metrics_say_what_holds_back_generation_and_since_when() -> None:
    status = replace(ready(), hold=HOLD, halted="paused", halted_s=3.0, queued_operations=7, queued_bytes=1000)
    told = {"operation": "Begin", "phase": "open", "held_s": 12.5, "update_id": "abc", "ends_in_s": 287.5}
    async with stage(status=status) as at:
        health = (await at.client.get("/health")).json()
        info = (await at.client.get("/server_info")).json()
        assert health["hold"] == info["hold"] == told
        assert (health["halted"], health["halted_s"], info["halted_s"]) == ("paused", 3.0, 3.0)
        assert (info["queued_operations"], info["queued_bytes"]) == (7, 1000)
        assert await at.metric('safelight_hold_seconds{operation="Begin"}') == 12.5
        assert await at.metric('safelight_halted_seconds{reason="paused"}') == 3.0
        assert await at.metric("safelight_queued_operations") == 7


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


ODD = [b'{"group_name": "g", "names": 3}', b'{"group_name": "g", "names": [], "dtypes": [], "shapes": [], "x": 1}']


@pytest.mark.parametrize("body", ODD)
async def test_a_refusal_before_anything_is_announced_ends_the_group_too(body: bytes) -> None:
    async with stage() as at:
        assert (await at.client.post("/update_weights_from_distributed", content=body)).status_code == 422
        await at.until(lambda: [one for one in at.scheduler.received if isinstance(one, Operate)])
        (asked,) = [one for one in at.scheduler.received if isinstance(one, Operate)]
        assert asked.operation == Leave("g")
