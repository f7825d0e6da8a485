"""``POST /generate`` over a real port, with a played scheduler: what is answered, and what is stopped."""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import statistics
import time
from typing import Any

import httpx
import msgspec
import psutil
import pytest
from PIL import Image as pillow

from safelight.protocol.codec import Buffer
from safelight.protocol.errors import DeadlinePassed, InvalidRequest, QueueFull, SafelightError
from safelight.protocol.generation import Failed, Generate, Preview, Queued, Result
from safelight.protocol.messages import FromScheduler
from safelight.protocol.replicas import Batching, ImageTask, Parameter, Status

from .played_scheduler import IMAGE_MODEL, PNG, finished, ready
from .stage import stage

pytestmark = pytest.mark.anyio


async def test_the_reply_has_the_contract_s_fields() -> None:
    async with stage() as played:
        reply = await played.client.post("/generate", json={"prompt": "a", "n": 2, "seed": 3})
    assert reply.status_code == 200
    body = reply.json()
    total_s = body["timings"].pop("total_s")
    assert 0 < total_s < 5
    assert body == {
        "id": reply.headers["x-request-id"],
        "model": "tiny",
        "weight_version": "7",
        "weight_versions": ["7"],
        "adapters": [],
        "steps": 4,
        "skipped_forwards": 0,
        "timings": {"queue_s": 0.1, "encode_s": 0.2, "denoise_s": 0.3, "decode_s": 0.4},
        "outputs": [
            {
                "b64": base64.b64encode(PNG).decode(),
                "format": "png",
                "seed": seed,
                "width": 64,
                "height": 48,
                "num_frames": None,
                "fps": None,
                "audio_sample_rate": None,
            }
            for seed in (3, 4)
        ],
        "warnings": [],
    }


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/x-www-form-urlencoded"}])
async def test_a_json_body_needs_no_content_type(headers: dict[str, str]) -> None:
    async with stage() as played:
        reply = await played.client.post("/generate", content=b'{"prompt": "a"}', headers=headers)
    assert reply.status_code == 200


async def test_a_large_result_arrives_whole() -> None:
    data = bytes(range(256)) * 4096
    async with stage(answer=lambda generate: finished(generate, data)) as played:
        reply = await played.client.post("/generate", json={"prompt": "a"})
    assert base64.b64decode(reply.json()["outputs"][0]["b64"]) == data


async def test_accepting_a_picture_gives_the_file_and_puts_the_rest_into_headers() -> None:
    async with stage() as played:
        reply = await played.client.post(
            "/generate", json={"prompt": "a\r\nX-Evil: 1", "seed": 9}, headers={"Accept": "image/webp"}
        )
        (generate,) = played.scheduler.generates()
    assert generate.output_format == "webp"
    assert reply.headers["content-type"] == "image/webp"
    assert reply.content == PNG
    reported = {name: value for name, value in reply.headers.items() if name.startswith("x-safelight-")}
    assert reported.pop("x-safelight-id") == reply.headers["x-request-id"]
    assert float(reported.pop("x-safelight-total-s")) > 0
    assert reported == {
        "x-safelight-model": "tiny",
        "x-safelight-weight-version": "7",
        "x-safelight-weight-versions": "7",
        "x-safelight-seed": "9",
        "x-safelight-steps": "4",
        "x-safelight-width": "64",
        "x-safelight-height": "48",
        "x-safelight-queue-s": "0.100000",
        "x-safelight-encode-s": "0.200000",
        "x-safelight-denoise-s": "0.300000",
        "x-safelight-decode-s": "0.400000",
    }
    assert "evil" not in reply.headers


async def test_a_size_that_the_pipeline_rounds_is_reported_in_every_form_of_the_reply() -> None:
    asked = {"prompt": "a", "num_frames": 18}
    video = msgspec.structs.replace(
        IMAGE_MODEL, kind="video", arguments=IMAGE_MODEL.arguments | {"num_frames": Parameter(["int"], 81)}
    )

    def answer(generate: Generate) -> list[FromScheduler]:
        *events, result = finished(generate)
        assert isinstance(result, Result)
        made = [msgspec.structs.replace(output, num_frames=17) for output in result.outputs]
        return [*events, msgspec.structs.replace(result, outputs=made)]

    async with stage(status=ready(video), answer=answer) as played:
        reply = (await played.client.post("/generate", json=asked)).json()
        file = await played.client.post("/generate", json=asked, headers={"Accept": "video/mp4"})
        stream = await played.client.post("/generate", json=asked | {"stream": True})
        exact = (await played.client.post("/generate", json=asked | {"num_frames": 17})).json()
    assert reply["outputs"][0]["num_frames"] == 17
    (warning,) = reply["warnings"]
    assert "num_frames is 17, not 18" in warning
    assert "num_frames is 17, not 18" in file.headers["x-safelight-warnings"]
    assert "num_frames is 17, not 18" in stream.text
    assert exact["warnings"] == []


async def test_a_pipelines_own_frame_rate_is_reported_with_the_clips() -> None:
    video = msgspec.structs.replace(
        IMAGE_MODEL,
        kind="video",
        arguments=IMAGE_MODEL.arguments | {"num_frames": Parameter(["int"], 14), "fps": Parameter(["int"], 7)},
    )
    async with stage(status=ready(video)) as played:
        both = await played.client.post("/generate", json={"prompt": "a", "fps": 12, "extra": {"fps": 5}})
        await played.client.post("/generate", json={"prompt": "a", "extra": {"fps": 5}})
        wrong = await played.client.post("/generate", json={"prompt": "a", "extra": {"fps": "5"}})
        first, second = played.scheduler.generates()
    assert both.status_code == 200
    assert (first.fps, first.extra) == (12, {"fps": 5})
    assert (second.fps, second.extra) == (None, {"fps": 5})
    assert (wrong.status_code, wrong.json()["error"]["field"]) == (400, "extra.fps")
    async with stage() as played:
        reply = await played.client.post("/generate", json={"prompt": "a", "extra": {"fps": 5}})
    assert "a field of the request itself" in reply.json()["error"]["message"]


async def test_a_pipeline_that_takes_several_images_gets_one_for_each_of_its_arguments() -> None:
    file = io.BytesIO()
    pillow.new("RGB", (64, 64)).save(file, format="PNG")
    image = base64.b64encode(file.getvalue()).decode()
    task = ImageTask(
        pipeline="TinyInpaintPipeline",
        arguments=IMAGE_MODEL.arguments,
        size_multiple=16,
        image_arguments=("image", "mask_image"),
        several_images=False,
        supports_preview=False,
        batching=Batching("merged", "because"),
    )
    async with stage(status=ready(msgspec.structs.replace(IMAGE_MODEL, image_task=task))) as played:
        both = await played.client.post("/generate", json={"prompt": "a", "image": [image, image]})
        one = await played.client.post("/generate", json={"prompt": "a", "image": image})
        (message,) = played.scheduler.generates()
    assert both.status_code == 200
    assert len(message.images) == 2
    assert (one.status_code, one.json()["error"]["field"]) == (400, "image")
    assert "2 images, in this order: image, mask_image; not 1" in one.json()["error"]["message"]


async def test_a_request_without_what_the_pipeline_does_not_run_without_is_refused_before_any_work() -> None:
    required = {
        "negative_prompt": Parameter(["str"], is_required=True),
        "control_mode": Parameter(["int"], is_required=True),
    }
    model = msgspec.structs.replace(IMAGE_MODEL, arguments=IMAGE_MODEL.arguments | required)
    complete = {"prompt": "a", "negative_prompt": "", "extra": {"control_mode": 0}}
    async with stage(status=ready(model)) as played:
        replies = [
            await played.client.post("/generate", json={name: complete[name] for name in names})
            for names in (("prompt", "extra"), ("prompt", "negative_prompt"), tuple(complete))
        ]
        (message,) = played.scheduler.generates()
    assert [reply.status_code for reply in replies] == [400, 400, 200]
    assert [reply.json()["error"]["field"] for reply in replies[:2]] == ["negative_prompt", "extra.control_mode"]
    assert (message.negative_prompt, message.extra) == ("", {"control_mode": 0})


async def test_names_that_no_header_can_hold_are_quoted() -> None:
    model = msgspec.structs.replace(IMAGE_MODEL, model="模\r\nX-Evil: 1")
    async with stage(status=ready(model)) as played:
        reply = await played.client.post("/generate", json={"prompt": "a"}, headers={"Accept": "image/png"})
    assert reply.status_code == 200
    assert reply.headers["x-safelight-model"] == "%E6%A8%A1%0D%0AX-Evil: 1"


async def test_a_picture_of_two_outputs_is_refused_before_any_work() -> None:
    async with stage() as played:
        reply = await played.client.post("/generate", json={"prompt": "a", "n": 2}, headers={"Accept": "image/png"})
        assert played.scheduler.generates() == []
    assert reply.status_code == 400
    assert "one output" in reply.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (QueueFull("full", retry_after_s=2.5), 429, "3"),
        (QueueFull("full"), 429, "1"),
        (DeadlinePassed("too late"), 504, None),
        (InvalidRequest("no", field="extra.a"), 400, None),
    ],
)
async def test_a_refusal_is_a_reply_with_its_own_status(
    error: SafelightError, status: int, retry_after: str | None, stream: bool
) -> None:
    async with stage(answer=lambda generate: [Failed(generate.request_id, error.info())]) as played:
        reply = await played.client.post("/generate", json={"prompt": "a", "stream": stream})
    assert reply.status_code == status
    assert reply.headers.get("retry-after") == retry_after
    assert reply.json() == {
        "error": {
            "code": error.code,
            "message": error.message,
            "field": error.field,
            "request_id": reply.headers["x-request-id"],
        }
    }


async def test_without_a_ready_replica_the_reply_says_why_and_when_to_retry() -> None:
    async with stage(status=Status(0, 0, [])) as played:
        good = await played.client.post("/generate", json={"prompt": "a"})
        bad = await played.client.post("/generate", json={"prompt": "a", "n": 0})
    assert (good.status_code, good.headers["retry-after"]) == (503, "5")
    assert bad.status_code == 400, "a bad request is refused whether or not a replica could serve it"


async def test_two_requests_with_one_id_are_two_requests() -> None:
    async with stage() as played:
        headers = {"X-Request-Id": "mine"}
        replies = await asyncio.gather(
            *(played.client.post("/generate", json={"prompt": "a"}, headers=headers) for _ in range(2))
        )
        assert len({generate.request_id for generate in played.scheduler.generates()}) == 2
    assert [reply.json()["id"] for reply in replies] == ["mine", "mine"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_cancels_its_request_at_once(stream: bool) -> None:
    async with stage(answer=lambda generate: [Queued(generate.request_id, 0)]) as played:
        async with httpx.AsyncClient(base_url=played.url) as leaving:
            request = asyncio.create_task(leaving.post("/generate", json={"prompt": "a", "stream": stream}))
            await played.until(played.scheduler.generates)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
        await played.until(played.scheduler.cancelled)
        assert played.scheduler.cancelled() == [played.scheduler.generates()[0].request_id]
        assert await played.metric('safelight_requests_total{route="/generate",status="499"}') == 1
        assert await played.metric('safelight_requests_total{route="/generate",status="200"}') == 0


async def test_a_client_that_disconnects_while_it_sends_its_body_is_not_an_internal_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with stage() as played:
        host, port = played.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.close()
        await asyncio.sleep(0.1)
        assert await played.metric('safelight_requests_total{route="/generate",status="499"}') == 1
    assert "Traceback" not in caplog.text


async def test_a_finished_request_is_not_cancelled() -> None:
    async with stage() as played:
        await played.client.post("/generate", json={"prompt": "a"})
        await asyncio.sleep(0.1)
        assert played.scheduler.cancelled() == []
        assert await played.metric("safelight_outputs_total") == 1


async def test_the_path_from_http_to_the_scheduler_and_back_costs_less_than_two_plain_answers() -> None:
    """In seconds of this process, which is client, server and played scheduler: the machine may be busy."""
    async with stage() as played:

        async def cost(method: str, path: str, **body: Any) -> float:
            started = time.process_time()
            for _ in range(20):
                await played.client.request(method, path, **body)
            return time.process_time() - started

        costs = [
            (await cost("POST", "/generate", json={"prompt": "a"}), await cost("GET", "/health")) for _ in range(7)
        ]
        assert statistics.median(generating / plain for generating, plain in costs) < 3


async def test_a_reader_that_stops_reading_does_not_make_the_server_grow() -> None:
    async with stage(answer=lambda generate: [Queued(generate.request_id, 0)]) as played:
        reader = _reader_that_does_not_read(played.url)
        await played.until(played.scheduler.generates)
        (generate,) = played.scheduler.generates()
        before = psutil.Process().memory_info().rss
        for step in range(2000):
            await played.scheduler.say(Preview(generate.request_id, 0, step, 2000, Buffer(bytes(100_000))))
            await asyncio.sleep(0 if step % 20 else 0.01)
        for event in finished(generate):
            await played.scheduler.say(event)
        await asyncio.sleep(0.5)
        assert psutil.Process().memory_info().rss - before < 50_000_000, "200 MB of previews were sent"
        reader.settimeout(5)
        received = await asyncio.to_thread(_read_to_the_end, reader)
    assert b"event: preview" in received
    assert b"event: result" in received, "the result is never dropped"


def _reader_that_does_not_read(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    reader = socket.create_connection((host, int(port)))
    body = b'{"prompt": "a", "stream": true}'
    reader.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    return reader


def _read_to_the_end(reader: socket.socket) -> bytes:
    received = b""
    with reader:
        while not received.endswith(b"0\r\n\r\n"):  # the last chunk of the body
            received += reader.recv(1 << 20)
    return received
