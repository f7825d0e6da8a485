"""Names and versions from clients have an alphabet, and a refusal names the field."""

from __future__ import annotations

import itertools

import pytest

from .stage import stage

pytestmark = pytest.mark.anyio

GROUP = {"master_address": "localhost", "master_port": 1, "rank_offset": 1, "world_size": 2}
BODIES = {
    "weight_version": ("/update_weights_from_disk", {"model_path": "/m"}),
    "model_path": ("/update_weights_from_disk", {}),
    "master_address": ("/init_weights_update_group", GROUP),
    "group_name": ("/init_weights_update_group", GROUP),
    "lora_nickname": ("/set_lora", {"lora_path": "/m"}),
    "lora_path": ("/set_lora", {"lora_nickname": "a"}),
    "target_modules": ("/begin_weights_update", {}),
    "update_id": ("/commit_weights_update", {}),
    "request_id": ("/abort_request", {}),
}


FORGED = ["7\nINFO forged", "\x1b[2J", "a\u2028b", "a\u202eb", "a\n", "", "x" * 1001]


async def test_no_name_has_a_line_s_end_or_an_escape_sequence() -> None:
    async with stage() as played:
        for (field, (path, body)), value in itertools.product(BODIES.items(), FORGED):
            given = [value] if field == "target_modules" else value
            reply = await played.client.post(path, json={**body, field: given})
            assert (reply.status_code, reply.json()["error"]["field"]) == (422, field)
            assert "\\A" not in reply.json()["error"]["message"], "a regular expression does not help the client"
        for value in FORGED:
            headers = {"Content-Type": "application/x-safetensors"}
            reply = await played.client.post(
                "/update_weights_from_tensor", params={"weight_version": value}, headers=headers
            )
            assert (reply.status_code, reply.json()["error"]["field"]) == (422, "weight_version")
