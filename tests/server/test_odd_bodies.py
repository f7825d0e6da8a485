"""Every body gets a reply, and never an internal error."""

from __future__ import annotations

import asyncio
import copy
import gzip
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.protocol.adapters import AdapterState
from safelight.protocol.config import Config
from safelight.protocol.messages import FromScheduler, ToScheduler
from safelight.protocol.replicas import Batching, ImageTask, Parameter
from safelight.protocol.reports import Operated

from .played_scheduler import ARGUMENTS, IMAGE_MODEL, ready
from .stage import stage

MODEL = msgspec.structs.replace(
    IMAGE_MODEL,
    kind="video",
    arguments=ARGUMENTS | {"num_frames": Parameter(["int"], 81), "true_cfg_scale": Parameter(["float"], 1.0)},
    image_task=ImageTask(
        pipeline="TinyImagePipeline",
        arguments=ARGUMENTS,
        size_multiple=16,
        several_images=True,
        supports_preview=True,
        batching=Batching("merged", "because"),
    ),
)
UPDATE = {"weight_version": "1", "flush_cache": True, "mode": "wait", "update_id": "u"}
LORA = {"weight_update_mode": "lora_merge", "lora_alpha": 4.0, "lora_rank": 4}
GENERATE = {
    "prompt": ["a"], "negative_prompt": "b", "width": 64, "height": 64, "num_frames": 9, "fps": 8,
    "num_inference_steps": 3, "guidance_scale": 2.5, "true_cfg_scale": 2.0, "seed": [3], "n": 1,
    "num_outputs_per_prompt": 1, "lora": [{"name": "a", "scale": 0.5}], "priority": 1, "timeout_s": 2.0,
    "output_format": "mp4", "stream": False, "preview_every": 0, "deterministic": True,
    "extra": {"max_sequence_length": 9, "sigmas": [1.0, 0.5], "prompt_2": "c", "guidance_rescale": 0.5},
}  # fmt: skip
ROLLOUT = {
    **{name: value for name, value in GENERATE.items() if name not in ("output_format", "extra", "stream")},
    "rollout": True, "rollout_sde_type": "sde", "rollout_noise_level": 0.7, "rollout_log_prob_no_const": True,
    "rollout_sde_step_indices": [0, 1], "rollout_return_step_indices": [0], "generator_device": "cpu",
    "sigmas": [1.0, 0.5, 0.25], "initial_noise": {"__tensor__": True, "data": "AAAA"},
    "extra_sampling_params": {"guidance_rescale": 0.5},
}  # fmt: skip
CUDA = {
    "name": "a", "dtype": "torch.float32", "shape": [2], "stride": [1], "offset": 0, "device": "GPU-1",
    "memory": "AA==", "storage_bytes": 8, "storage_offset": 0, "counters": "AA==",
    "counter": 0, "event": "AA==", "event_sync": True,
}  # fmt: skip
GROUP = {
    "master_address": "127.0.0.1", "master_port": 5000, "rank_offset": 1, "world_size": 2, "group_name": "g",
    "backend": "gloo", "timeout_s": 3.0,
}  # fmt: skip
BROADCAST = {"names": ["a"], "dtypes": ["float32"], "shapes": [[2, 3]], "group_name": "g", "target_modules": ["t"]}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/generate", GENERATE),
    ("/rollout/generate", ROLLOUT),
    ("/update_weights_from_disk", {"model_path": "nowhere", "target_modules": ["transformer"], **UPDATE}),
    ("/update_weights_from_tensor", {"serialized_named_tensors": ["AAAA"], "target_module": "transformer", **UPDATE}),
    ("/update_weights_from_tensor", {"shared": {"cuda_ipc": [[CUDA]]}, **UPDATE}),
    ("/update_weights_from_tensor", {"serialized_named_tensors": ["AAAA"], "payload_gpu_uuids": ["GPU-1"], **LORA}),
    ("/begin_weights_update", {"weight_version": "1", "target_modules": ["transformer"], "timeout_s": 3.0}),
    ("/commit_weights_update", {"update_id": "u", "require_complete": True}),
    ("/abort_weights_update", {"update_id": "u"}),
    ("/init_weights_update_group", GROUP),
    ("/update_weights_from_distributed", {**BROADCAST, **UPDATE}),
    ("/update_weights_from_distributed", {**BROADCAST, **LORA}),
    ("/destroy_weights_update_group", {"group_name": "g"}),
    ("/update_weights_from_tensor_checker", {"expected_named_tensors_sha256": {"a": "0" * 64}, "target_module": "t"}),
    ("/get_weights_checksum", {"module_names": ["transformer"], "detail": True}),
    ("/release_memory_occupation", {"tags": ["weights"]}),
    ("/resume_memory_occupation", {"tags": ["weights"]}),
    ("/pause_generation", {"mode": "wait"}),
    ("/continue_generation", {}),
    ("/abort_request", {"request_id": "a"}),
    ("/flush_cache", {}),
    (
        "/v1/set_lora",
        {"lora_nickname": ["a"], "lora_path": ["x"], "strength": [1.0], "lora_alpha": 2.0, "mode": "wait"},
    ),
    ("/v1/merge_lora_weights", {"target": "all", "strength": [0.5], "mode": "wait"}),
    ("/v1/unmerge_lora_weights", {"target": "all", "mode": "wait"}),
    ("/v1/unload_lora", {"lora_nickname": "a", "mode": "wait"}),
]

NUMBERS = [2**63, 2**64, -(2**63) - 1, 2**65, 10**400, -1, 0, 1e308, -1e308, 5e-324]
ODD = [
    *NUMBERS,
    float("nan"),
    float("inf"),
    -float("inf"),
    None,
    True,
    "",
    "\x00",
    "x" * 5000,
    [],
    {},
    [[]],
    [{}],
    [None],
]
DEEP: Any = []
for _ in range(600):
    DEEP = [DEEP]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every part of a body, and to an unknown field in each object."""
    if path:
        yield path
    if isinstance(value, dict):
        yield (*path, "unknown")
        for name, part in value.items():
            yield from places(part, (*path, name))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from places(part, (*path, index))


def changed(body: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    body = copy.deepcopy(body)
    inner: Any = body
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return body


@st.composite
def odd_requests(draw: st.DrawFn) -> tuple[str, bytes, str]:
    route, body = draw(st.sampled_from(BODIES))
    value = draw(st.one_of(st.sampled_from([*ODD, DEEP]), st.lists(st.sampled_from(ODD), max_size=3)))
    path = draw(st.sampled_from(list(places(body)) or [("unknown",)]))
    made = changed(body, path, value)
    if route == "/rollout/generate" and draw(st.booleans()):
        try:
            return route, msgspec.msgpack.encode(made), "application/msgpack"
        except (OverflowError, RecursionError):
            pass
    return route, json.dumps(made).encode(), "application/json"


class Running:
    """The application over a real port, in a thread of its own."""

    def __init__(self) -> None:
        self.url = ""
        self._ready, self._end = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with stage(Config(max_outputs=4), status=ready(MODEL)) as played:
            played.scheduler.operated = _operated
            self.url = played.url
            self._ready.set()
            await self._end.wait()

    def __enter__(self) -> Running:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()


def _operated(message: ToScheduler) -> list[FromScheduler]:
    request_id = getattr(message, "request_id", "")
    return [Operated(request_id, {}, "1", [], AdapterState({}, {}))] if request_id else []


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with Running() as running, httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


def test_the_bodies_as_they_stand_are_read(client: httpx.Client) -> None:
    """Or nothing would be learnt from odd ones."""
    assert client.post("/generate", json=GENERATE).status_code == 200
    group = client.post("/init_weights_update_group", json=GROUP)
    assert group.status_code == 200, group.text
    assert client.post("/update_weights_from_distributed", json=BROADCAST).status_code == 200


@settings(max_examples=300, deadline=None)
@given(odd_requests())
def test_no_body_is_a_fault_of_the_server(client: httpx.Client, asked: tuple[str, bytes, str]) -> None:
    route, body, kind = asked
    reply = client.post(route, content=body, headers={"Content-Type": kind})
    assert reply.status_code < 500, (route, body[:2000], reply.text)


@pytest.mark.parametrize("number", [2**64, 2**65, -(2**65), 10**300])
def test_an_integer_of_more_bits_than_a_message_holds_is_refused_by_its_field(
    client: httpx.Client, number: int
) -> None:
    for route, body in BODIES:
        for path in places(body):
            inner: Any = body
            for step in path:
                inner = inner.get(step) if isinstance(inner, dict) else inner[step]
            if type(inner) is int:
                reply = client.post(route, content=json.dumps(changed(body, path, number)))
                assert 400 <= reply.status_code < 500, (route, path, reply.text)
                field = reply.json()["error"]["field"]
                assert field is not None, (route, path, reply.text)
                assert str(field).split(".")[0] == path[0], (route, path, reply.text)


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (("rollout_noise_level",), "rollout_noise_level"),
        (("guidance_scale",), "guidance_scale"),
        (("sigmas", 1), "sigmas"),
        (("extra_sampling_params", "guidance_rescale"), "extra.guidance_rescale"),
        (("width",), "width"),
    ],
)
def test_a_number_that_is_none_is_refused_by_its_field(
    client: httpx.Client, number: float, changes: tuple[Any, ...], field: str
) -> None:
    """JSON has no such numbers, and msgpack has."""
    body = msgspec.msgpack.encode(changed(ROLLOUT, changes, number))
    reply = client.post("/rollout/generate", content=body, headers={"Content-Type": "application/msgpack"})
    assert (reply.status_code in (400, 422), reply.json()["error"]["field"]) == (True, field)


@pytest.mark.parametrize(("route", "body"), [(route, body) for route, body in BODIES if len(body) > 1])
def test_a_misspelt_field_is_refused_with_the_one_that_was_meant(
    client: httpx.Client, route: str, body: dict[str, Any]
) -> None:
    name = next(iter(body))
    reply = client.post(route, json={**body, name + "x": body[name]})
    error = reply.json()["error"]
    assert (400 <= reply.status_code < 500, error["field"]) == (True, name + "x")
    assert f"did you mean {name}" in error["message"]


WITHOUT_EFFECT: list[tuple[str, dict[str, Any], str]] = [
    ("/update_weights_from_tensor", {"serialized_named_tensors": ["AAAA"], "lora_rank": 4}, "lora_rank"),
    ("/update_weights_from_distributed", {**BROADCAST, "lora_alpha": 4.0}, "lora_alpha"),
    ("/update_weights_from_distributed", {**BROADCAST, "lora_complete": True}, "lora_complete"),
    (
        "/update_weights_from_tensor",
        {"shared": {"cuda_ipc": [[CUDA]]}, "payload_gpu_uuids": ["GPU-1"]},
        "payload_gpu_uuids",
    ),
    (
        "/update_weights_from_tensor",
        {"shared": {"cuda_ipc": [[CUDA]]}, "load_format": "flattened_bucket"},
        "load_format",
    ),
    (
        "/update_weights_from_tensor",
        {"serialized_named_tensors": ["AAAA"], "target_modules": ["transformer"], "target_module": "vae"},
        "target_module",
    ),
    (
        "/update_weights_from_tensor_checker",
        {"expected_named_tensors_sha256": {"a": "0"}, "expected_transformer_sha256": {"a": "1"}},
        "expected_transformer_sha256",
    ),
    (
        "/update_weights_from_tensor_checker",
        {"target_module": "vae", "expected_transformer_sha256": {"b": "0"}},
        "expected_transformer_sha256",
    ),
    ("/abort_request", {"rid": "a", "request_id": "b"}, "request_id"),
    ("/abort_request", {"rid": "a", "abort_all": True}, "request_id"),
    ("/pause_generation?mode=abort", {}, "mode"),
    ("/update_weights_from_tensor?weight_version=5", {"serialized_named_tensors": ["AAAA"]}, "weight_version"),
    ("/generate?seed=5", GENERATE, "seed"),
    ("/rollout/generate?seed=5", ROLLOUT, "seed"),
]


@pytest.mark.parametrize(("route", "body", "field"), WITHOUT_EFFECT)
def test_a_field_that_would_be_without_effect_is_refused_by_its_name(
    client: httpx.Client, route: str, body: dict[str, Any], field: str
) -> None:
    reply = client.post(route, json=body)
    assert (reply.status_code, reply.json()["error"]["field"]) == (422 if "?" in route else 400, field), reply.text


def test_weights_are_not_reset_without_a_snapshot_to_compare_with(client: httpx.Client) -> None:
    reply = client.post("/weights_checker", json={"action": "reset_tensors"})
    assert (reply.status_code, reply.json()["error"]["field"]) == (409, "action"), reply.text
    assert client.post("/weights_checker", json={"action": "snapshot"}).status_code == 200
    reply = client.post("/weights_checker", json={"action": "compare"})
    assert (reply.status_code, reply.json()["error"]["field"]) == (400, "skip_tensor_list"), reply.text


@pytest.mark.parametrize("route", ["/generate", "/update_weights_from_tensor", "/pause_generation"])
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, identity"])
def test_a_body_that_is_called_compressed_is_refused_in_words(client: httpx.Client, route: str, encoding: str) -> None:
    for body in (gzip.compress(json.dumps(GENERATE).encode()), b"{}"):
        for kind in ("application/json", "application/x-safetensors"):
            reply = client.post(route, content=body, headers={"Content-Encoding": encoding, "Content-Type": kind})
            assert (reply.status_code, "Content-Encoding" in reply.text) == (422, True), reply.text
    assert client.post("/continue_generation", content=b"{}", headers={"Content-Encoding": "identity"}).is_success


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Content-Transfer-Encoding: base64", 422),
        ("Content-Transfer-Encoding: quoted-printable", 422),
        ("Content-Type: text/plain; charset=utf-7", 422),
        ("Content-Type: text/plain; charset=", 422),
        ("Content-Type: text/plain; charset=nowhere", 422),
        ("Content-Transfer-Encoding: 8bit", 200),
        ("Content-Type: text/plain; charset=UTF-8", 200),
        ("Content-Type: text/plain; charset=utf8", 200),
        ("Content-Type: text/plain; charset=ascii", 200),
        ("Content-Type: text/plain; charset=US-ASCII", 200),
        ("Content-Type: text/plain; charset=iso-8859-1", 200),
    ],
)
def test_no_prompt_is_drawn_from_the_letters_of_its_encoding(client: httpx.Client, header: str, status: int) -> None:
    form = f'--B\r\nContent-Disposition: form-data; name="prompt"\r\n{header}\r\n\r\nYSBzdGFy\r\n--B--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=B", "Accept": "application/json"}
    reply = client.post("/generate", content=form.encode(), headers=headers)
    assert reply.status_code == status, reply.text


def test_a_part_whose_text_is_not_utf_8_is_named(client: httpx.Client) -> None:
    for kind, text, named in (("utf-7", "a star", "'utf-7'"), ("ISO-8859-1", "étoile", "Latin-1")):
        head = f'Content-Disposition: form-data; name="prompt"\r\nContent-Type: text/plain; charset={kind}'
        content = f"--B\r\n{head}\r\n\r\n{text}\r\n--B--\r\n".encode("latin-1")
        reply = client.post("/generate", content=content, headers={"Content-Type": "multipart/form-data; boundary=B"})
        assert (reply.status_code, "'prompt'" in reply.text, named in reply.text) == (422, True, True), reply.text
