"""The cost of a body is bounded before it is read: values, depth, bytes per route, memory and time in all."""

from __future__ import annotations

import json
import time

import msgspec
import orjson
import pytest

from safelight.protocol.config import Config
from safelight.protocol.errors import BodyTooLarge, Malformed
from safelight.server.bounded import MAX_VALUES, check_json, read_msgpack

from .stage import stage
from .test_connections import strangers

UNKNOWN = b'{"prompt": "a"' + b"".join(b', "%d": 0' % i for i in range(1_000_000)) + b"}"


def test_a_million_keys_cost_less_than_to_parse_them() -> None:
    began = time.perf_counter()
    with pytest.raises(BodyTooLarge, match=f"{MAX_VALUES} values"):
        check_json(UNKNOWN, MAX_VALUES)
    refused = time.perf_counter()
    orjson.loads(UNKNOWN)
    assert refused - began < (time.perf_counter() - refused) / 2


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"prompt": [",[{" * 3000] * 20}),
        json.dumps({"prompt": ['"' * 9000, "\\" * 9000, '\\"[' * 3000] * 20}),
        json.dumps({"extra": {"values": [*range(10_000)]}}),
        "[" * 64 + "]" * 64,
        json.dumps([{"a": {}}] * 5000),
    ],
)
def test_commas_and_brackets_in_strings_do_not_count_as_values(text: str) -> None:
    check_json(text.encode(), MAX_VALUES)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"a":' * 100, b"[" * 65 + b"]" * 65, b'["' + b'\\"' * 300_000 + b"[" * 100]
)
def test_what_is_nested_too_deep_or_never_ends_is_refused_at_once(text: bytes) -> None:
    with pytest.raises((Malformed, BodyTooLarge)):
        check_json(text, MAX_VALUES)


def test_a_string_without_an_end_is_looked_at_once() -> None:
    with pytest.raises(Malformed, match="not JSON"):
        check_json(b'["' + b'\\",[' * 300_000, MAX_VALUES)


@pytest.mark.parametrize(
    "body",
    [
        msgspec.msgpack.encode({str(i): 0 for i in range(300)}),
        msgspec.msgpack.encode({str(i): 0 for i in range(70_000)}),
        msgspec.msgpack.encode({"image": [""] * 100_000}),
        msgspec.msgpack.encode({"extra": [0] * 1_100_000}),
    ],
)
def test_msgpack_is_bounded_too(body: bytes) -> None:
    with pytest.raises(BodyTooLarge):
        read_msgpack(bytearray(body))


def test_msgpack_with_large_noise_is_read() -> None:
    noise = {"__tensor__": True, "data": bytes(3_000_000), "shape": [1], "dtype": "torch.float32"}
    found = read_msgpack(bytearray(msgspec.msgpack.encode({"prompt": "a", "n": 2, "initial_noise": noise})))
    assert found == {"prompt": "a", "n": 2, "initial_noise": {"__tensor__": True, "data": bytes(3_000_000)}}


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", UNKNOWN),
        ("/generate", b'{"prompt": "a"}'.ljust(2_000_000)),
        ("/rollout/generate", b'{"prompt": "a"}'.ljust(2_000_000)),
        ("/pause_generation", b"{}".ljust(2_000_000)),
        ("/set_lora", b"{}".ljust(2_000_000)),
        ("/update_weights_from_tensor_checker",
         orjson.dumps({"expected_named_tensors_sha256": {str(i): "" for i in range(1_000_000)}})),
        ("/update_weights_from_distributed", b'{"names": [' + b'"a",' * 1_000_000 + b'"a"]}'),
    ],
)  # fmt: skip
async def test_each_route_has_its_own_limits(path: str, body: bytes) -> None:
    async with stage() as played:
        reply = await played.client.post(path, content=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.anyio
async def test_bodies_that_stall_keep_out_large_ones_and_end_in_time() -> None:
    image = orjson.dumps({"prompt": "a", "image": "A" * 800_000})
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(image)
    async with (
        stage(Config(max_bodies_mb=1, body_timeout_s=3)) as played,
        strangers(played, 1, head + image[:-1]) as (stalled,),
    ):
        refused = await played.client.post("/generate", content=image)
        while refused.status_code != 429:  # until the stalled one has come as far
            refused = await played.client.post("/generate", content=image)
        assert refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) > 0
        assert (await played.client.post("/generate", json={"prompt": "a"})).status_code == 200
        assert (await stalled.readline()).startswith(b"HTTP/1.1 504 ")
        after = await played.client.post("/generate", content=image)
        assert after.json()["error"]["field"] == "image", "it is read again, and is not a picture"
