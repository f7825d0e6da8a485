"""A request that waits keeps what its message has, and nothing of its body, which may be far larger.

A JPEG may have a film behind its end: of 60 MB of base64, a picture of 12 kB waits, and counts as that.
"""

from __future__ import annotations

import asyncio
import base64
import gc

import pytest

from safelight.protocol.generation import Generate, Queued
from safelight.protocol.messages import FromScheduler
from safelight.server.schemas import GenerateBody

from .played_scheduler import ready
from .stage import stage
from .test_images import file, picture
from .test_odd_bodies import MODEL

pytestmark = pytest.mark.anyio

IMAGE = base64.b64encode(file(picture(), "JPEG") + bytes(100_000)).decode()


def queued(generate: Generate) -> list[FromScheduler]:
    return [Queued(generate.request_id, 0)]


def kept() -> list[GenerateBody]:
    gc.collect()
    return [one for one in gc.get_objects() if isinstance(one, GenerateBody)]


@pytest.mark.parametrize(("path", "stream"), [("/generate", False), ("/generate", True), ("/rollout/generate", False)])
async def test_a_request_that_waits_keeps_nothing_of_its_body(path: str, stream: bool) -> None:
    body = {"prompt": "a", "image": IMAGE, **({"stream": True} if stream else {})}
    before = kept()
    async with stage(answer=queued, status=ready(MODEL)) as played:
        waiting = asyncio.create_task(played.client.post(path, json=body))
        await played.until(played.scheduler.generates, 60)
        assert len(played.scheduler.generates()[0].images) == 1
        assert [one for one in kept() if not any(one is other for other in before)] == []
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
