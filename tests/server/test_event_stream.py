"""``stream: true``: server-sent events in order, with errors at the right place and no silence."""

from __future__ import annotations

import asyncio
import base64
import json

import httpx
import pytest

from safelight.protocol.codec import Buffer
from safelight.protocol.errors import Unavailable
from safelight.protocol.generation import Failed, Generate, Preview, Progress, Queued
from safelight.protocol.messages import FromScheduler
from safelight.server import event_stream
from safelight.server.subscription import EVENTS_KEPT, Subscription

from .played_scheduler import PNG, finished
from .stage import stage

pytestmark = pytest.mark.anyio

BODY = {"prompt": "a", "stream": True, "seed": 5}


def events_of(reply: httpx.Response) -> list[tuple[str, dict[str, object]]]:
    events = []
    for block in reply.text.split("\n\n"):
        if block.startswith("event: "):
            name, data = block.split("\n")
            events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


async def test_events_come_in_order_and_end_with_the_json_reply() -> None:
    def answer(generate: Generate) -> list[FromScheduler]:
        *begun, result = finished(generate)
        request_id = generate.request_id
        progress = [Progress(request_id, 0, step, 2) for step in (1, 2)]
        return [*begun, progress[0], Preview(request_id, 0, 1, 2, Buffer(b"jpeg")), progress[1], result]

    async with stage(answer=answer) as played:
        streamed = await played.client.post("/generate", json={**BODY, "preview_every": 1})
        whole = await played.client.post("/generate", json={**BODY, "stream": False})
    assert streamed.status_code == 200
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.headers["cache-control"] == "no-cache"
    *events, (last, result) = events_of(streamed)
    assert events == [
        ("queued", {"position": 0}),
        ("progress", {"output": 0, "step": 1, "steps": 2}),
        ("preview", {"output": 0, "step": 1, "steps": 2, "b64": base64.b64encode(b"jpeg").decode()}),
        ("progress", {"output": 0, "step": 2, "steps": 2}),
    ]
    assert last == "result"
    assert result.keys() == whole.json().keys()
    assert result["outputs"] == whole.json()["outputs"]


async def test_only_a_streamed_request_asks_for_progress() -> None:
    async with stage() as played:
        await played.client.post("/generate", json=BODY)
        await played.client.post("/generate", json={**BODY, "stream": False})
        assert [generate.progress for generate in played.scheduler.generates()] == [True, False]


async def test_a_failure_after_the_first_event_is_an_error_event() -> None:
    def answer(generate: Generate) -> list[FromScheduler]:
        error = Unavailable("the replica was lost")
        return [Queued(generate.request_id, 3), Failed(generate.request_id, error.info())]

    async with stage(answer=answer) as played:
        reply = await played.client.post("/generate", json=BODY)
    assert reply.status_code == 200
    assert events_of(reply) == [
        ("queued", {"position": 3}),
        (
            "error",
            {
                "error": {
                    "code": "unavailable",
                    "message": "the replica was lost",
                    "field": None,
                    "request_id": reply.headers["x-request-id"],
                }
            },
        ),
    ]


async def test_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "KEEP_ALIVE_S", 0.05)
    async with stage(answer=lambda generate: [Queued(generate.request_id, 0)]) as played:
        request = asyncio.create_task(played.client.post("/generate", json=BODY))
        await played.until(played.scheduler.generates)
        await asyncio.sleep(0.3)
        for event in finished(played.scheduler.generates()[0]):
            await played.scheduler.say(event)
        reply = await request
    assert 2 <= reply.text.count(": still working\n\n") <= 8
    assert [name for name, _ in events_of(reply)] == ["queued", "queued", "result"]


async def test_unread_progress_is_dropped_and_the_result_is_kept() -> None:
    generate = Generate(request_id="a", samples=[])
    subscription = Subscription("a")
    for step in range(10 * EVENTS_KEPT):
        subscription.deliver(Progress("a", 0, step, 1000))
    result = finished(generate, PNG)[-1]
    subscription.deliver(result)  # type: ignore[arg-type]  # a Result is one of them
    read = [await subscription.next() for _ in range(EVENTS_KEPT + 1)]
    assert [event.step for event in read[:-1] if isinstance(event, Progress)] == list(range(EVENTS_KEPT))
    assert read[-1] == result
