"""``POST /encode``, with a played scheduler: what the worker gets, and what is answered and refused."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load, save

from safelight.protocol.config import Config
from safelight.protocol.errors import Unavailable
from safelight.protocol.generation import Failed, Generate, GenerateCopies
from safelight.protocol.messages import FromScheduler
from safelight.protocol.replicas import Status

from .played_scheduler import finished, ready
from .stage import Stage, stage

pytestmark = pytest.mark.anyio

TENSORS = {"prompt_embeds": torch.arange(6.0).view(2, 3).bfloat16(), "text_ids": torch.zeros(2)}


def embedded(generate: Generate) -> list[FromScheduler]:
    return finished(generate, save(TENSORS) if generate.encode == "embeddings" else b"")


async def test_embeddings_are_a_file_with_the_form_of_each_tensor() -> None:
    asked = {"prompt": ["a", "b"], "return": "embeddings", "guidance_scale": 2.0, "lora": [{"name": "x"}]}
    async with stage(answer=embedded) as played:
        reply = await played.client.post("/encode", json=asked)
        (generate,) = played.scheduler.generates()
    assert (generate.encode, [sample.prompt for sample in generate.samples]) == ("embeddings", ["a", "b"])
    assert (generate.guidance_scale, generate.lora and generate.lora[0].name) == (2.0, "x")
    body = reply.json()
    assert body["timings"].pop("total_s") > 0
    data = body["outputs"][1].pop("b64")
    assert {name: tensor.tolist() for name, tensor in load(base64.b64decode(data)).items()} == {
        name: tensor.tolist() for name, tensor in TENSORS.items()
    }
    assert body["outputs"][1] == {
        "prompt": "b",
        "tensors": {
            "prompt_embeds": {"dtype": "BF16", "shape": [2, 3]},
            "text_ids": {"dtype": "F32", "shape": [2]},
        },
    }
    assert {key: body[key] for key in ("id", "model", "weight_version", "weight_versions", "adapters", "timings")} == {
        "id": reply.headers["x-request-id"],
        "model": "tiny",
        "weight_version": "7",
        "weight_versions": ["7"],
        "adapters": [],
        "timings": {"queue_s": 0.1, "encode_s": 0.2},
    }


async def test_the_cache_is_filled_where_nothing_else_is_asked_for() -> None:
    async with stage(answer=embedded) as played:
        reply = await played.client.post("/encode", json={"prompt": "a", "negative_prompt": None})
        (copies,) = _copies(played)
    assert reply.json()["outputs"] == [{"prompt": "a", "b64": None, "tensors": {}}]
    assert copies.request.encode == "cache"


def _copies(played: Stage) -> list[GenerateCopies]:
    return [message for message in played.scheduler.received if isinstance(message, GenerateCopies)]


def replicas(*states: str) -> Status:
    (one,) = ready().replicas
    return Status(0, 0, [replace(one, replica=number, state=state) for number, state in enumerate(states)])


async def test_a_generation_meets_a_known_prompt_on_whichever_ready_replica_takes_it() -> None:
    async with stage(answer=embedded, status=replicas("ready", "failed", "ready")) as played:
        reply = await played.client.post("/encode", json={"prompt": "a"})
        embeddings = await played.client.post("/encode", json={"prompt": "a", "return": "embeddings"})
        (copies,), (generate,) = _copies(played), played.scheduler.generates()
    assert reply.json()["replicas"] == copies.replicas == [0, 2]
    assert copies.request.request_id == reply.headers["x-safelight-id"], "an abort by this id ends all"
    assert generate.request_id == embeddings.headers["x-safelight-id"]


async def test_a_replica_that_is_lost_while_all_encode_fails_the_request_and_ends_the_others() -> None:
    lost = iter([False, True])

    def answer(generate: Generate) -> list[FromScheduler]:
        return [Failed(generate.request_id, Unavailable("Replica 1 was lost.").info())] if next(lost) else []

    async with stage(answer=answer, status=replicas("ready", "ready")) as played:
        reply = await played.client.post("/encode", json={"prompt": "a"})
        assert (reply.status_code, reply.json()["error"]["message"]) == (503, "Replica 1 was lost.")
        await played.until(lambda: reply.headers["x-safelight-id"] in played.scheduler.cancelled())


async def test_the_reply_waits_for_every_replica_and_then_cancels_none() -> None:
    late: list[FromScheduler] = []

    def answer(generate: Generate) -> list[FromScheduler]:
        if late:
            return embedded(generate)
        late.extend(embedded(generate))
        return []

    async with stage(answer=answer, status=replicas("ready", "ready")) as played:
        reply = asyncio.create_task(played.client.post("/encode", json={"prompt": "a"}))
        await played.until(lambda: _copies(played))
        await played.client.post("/encode", json={"prompt": "b", "return": "embeddings"})  # was sent, and read, later
        assert not reply.done()
        for event in late:
            await played.scheduler.say(event)
        assert (await reply).json()["replicas"] == [0, 1]
        assert played.scheduler.cancelled() == []


@pytest.mark.parametrize(
    ("asked", "status", "field", "said"),
    [
        ({}, 422, "prompt", "required"),
        ({"prompt": "a", "width": 64}, 422, "width", "no field"),
        ({"prompt": "a", "return": "everything"}, 400, "return", "cache"),
        ({"prompt": "a", "true_cfg_scale": 2.0}, 400, "true_cfg_scale", "does not take"),
        ({"prompt": "a", "guidance_scale": -1.0}, 400, "guidance_scale", "between"),
        ({"prompt": "a", "extra": {"unheard": 1}}, 400, "extra.unheard", "no argument"),
    ],
)
async def test_what_a_generation_would_refuse_is_refused(
    asked: dict[str, Any], status: int, field: str, said: str
) -> None:
    async with stage(answer=embedded) as played:
        reply = await played.client.post("/encode", json=asked)
        assert played.scheduler.generates() == []
    error = reply.json()["error"]
    assert (reply.status_code, error["field"]) == (status, field)
    assert said in error["message"]


async def test_a_server_without_a_prompt_cache_cannot_fill_it() -> None:
    async with stage(Config(prompt_cache_mb=0), answer=embedded) as played:
        refused = await played.client.post("/encode", json={"prompt": "a"})
        assert (await played.client.post("/encode", json={"prompt": "a", "return": "embeddings"})).status_code == 200
    assert (refused.status_code, refused.json()["error"]["field"]) == (400, "return")
