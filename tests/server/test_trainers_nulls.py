"""Trainers write whole objects: a field of theirs that is null is as if it were left out."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from safelight.protocol.adapters import AdapterState
from safelight.protocol.errors import Unavailable
from safelight.protocol.generation import Failed, Generate
from safelight.protocol.messages import FromScheduler, ToScheduler
from safelight.protocol.operations import Operate, Operation
from safelight.protocol.reports import Operated
from safelight.server.rollout_body import RolloutBody
from safelight.server.weight_transfer import GROUP

from .stage import Stage, stage

pytestmark = pytest.mark.anyio

ROLLOUT = {"prompt": "a", "seed": 3}
BROADCAST = {"names": ["a"], "dtypes": ["float32"], "shapes": [[1]]}
CALLS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "/update_weights_from_distributed": (BROADCAST, ["group_name", "flush_cache", "mode", "target_modules"]),
    "/update_weights_from_tensor": (
        {"serialized_named_tensors": ["AAAA"]},
        ["load_format", "flush_cache", "target_module", "lora_complete", "shared", "mode"],
    ),
    "/destroy_weights_update_group": ({}, ["group_name"]),
    "/commit_weights_update": ({"update_id": "u"}, ["require_complete", "weight_version"]),
    "/get_weights_checksum": ({}, ["module_names", "detail"]),
    "/release_memory_occupation": ({}, ["tags", "cpu_backup_tags"]),
    "/update_weight_version": ({"new_version": "9"}, ["abort_all_requests"]),
    "/set_lora": ({"lora_nickname": "a"}, ["lora_path", "target", "strength", "merge_mode", "lora_alpha", "strict"]),
}


def refused(generate: Generate) -> list[FromScheduler]:
    return [Failed(generate.request_id, Unavailable("not today").info())]


def operated(message: ToScheduler) -> list[FromScheduler]:
    asked = isinstance(message, Operate)
    return [Operated(message.request_id, {}, "7", [], AdapterState())] if asked else []


async def asked_for(played: Stage, body: dict[str, Any]) -> Generate:
    reply = await played.client.post("/rollout/generate", json=body)
    assert reply.status_code == 503, reply.text
    return replace(played.scheduler.generates()[-1], request_id="")


async def operation(played: Stage, path: str, body: dict[str, Any]) -> Operation:
    reply = await played.client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return [one for one in played.scheduler.received if isinstance(one, Operate)][-1].operation


async def test_a_null_in_a_rollout_s_body_is_a_field_that_is_left_out() -> None:
    nulls = {name: None for name in RolloutBody.model_fields if name not in ROLLOUT}
    async with stage(answer=refused) as played:
        assert await asked_for(played, ROLLOUT | nulls) == await asked_for(played, ROLLOUT)


async def test_a_null_among_sampling_parameters_contradicts_nothing_and_nothing_there_is_lost() -> None:
    within = {"extra": {"guidance_rescale": 0.5}, "num_inference_steps": 2}
    plain = ROLLOUT | {"num_inference_steps": 2, "extra": {"guidance_rescale": 0.5}}
    async with stage(answer=refused) as played:
        wanted = await asked_for(played, plain)
        assert await asked_for(played, ROLLOUT | {"extra_sampling_params": within}) == wanted
        assert (
            await asked_for(
                played, plain | {"extra_sampling_params": {"seed": None, "extra": None, "guidance_scale_2": None}}
            )
            == wanted
        )
        twice = plain | {"extra_sampling_params": {"num_inference_steps": 2}}
        assert (await played.client.post("/rollout/generate", json=twice)).status_code == 400


@pytest.mark.parametrize("path", CALLS)
async def test_a_null_in_a_trainer_s_call_is_a_field_that_is_left_out(path: str) -> None:
    body, others = CALLS[path]
    async with stage() as played:
        played.scheduler.operated = operated
        assert await operation(played, path, body | dict.fromkeys(others)) == await operation(played, path, body)


async def test_vllms_fields_for_packing_are_accepted_where_nothing_is_packed() -> None:
    info = {"names": ["a"], "dtype_names": ["float32"], "shapes": [[1]], "packed": False, "is_checkpoint_format": True}
    info |= {"packed_buffer_size_bytes": 1 << 30, "packed_num_buffers": 2}
    async with stage() as played:
        played.scheduler.operated = operated
        reply = await operation(played, "/update_weights", {"update_info": info})
        assert reply == await operation(played, "/update_weights_from_distributed", BROADCAST | {"group_name": GROUP})


@pytest.mark.parametrize("params", [{1: 2}, {1: 2, "a": 3}, {None: 2}])
async def test_a_map_of_msgpack_without_names_is_not_an_internal_error(params: dict[Any, Any]) -> None:
    body = ROLLOUT | {"extra": params, "extra_sampling_params": params}
    async with stage(answer=refused) as played:
        headers = {"Content-Type": "application/msgpack"}
        reply = await played.client.post("/rollout/generate", content=msgspec.msgpack.encode(body), headers=headers)
        assert reply.status_code == 422
