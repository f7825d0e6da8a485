"""Server-sent events from the real system: order, progress of every step, and previews that come before the result."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
from PIL import Image

from safelight.tests.live import LiveServer

from .asking import body


def events(url: str, asked: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    found = []
    with httpx.stream("POST", f"{url}/generate", json=asked | {"stream": True}, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for block in "".join(answer.iter_text()).split("\n\n"):
            fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
            if fields:
                found.append((fields["event"], json.loads(fields["data"])))
    return found


def test_every_step_and_every_preview_arrives_before_the_result(flux: LiveServer) -> None:
    asked = body("flux", num_inference_steps=12, preview_every=4, n=2, output_format="png")
    seen = events(flux.url, asked)
    names = [name for name, _ in seen]
    assert names[0] == "queued"
    assert names[-1] == "result"
    for output in (0, 1):
        steps = [data["step"] for name, data in seen if name == "progress" and data["output"] == output]
        previews = [data for name, data in seen if name == "preview" and data["output"] == output]
        assert steps == list(range(1, 13))
        assert sorted(data["step"] for data in previews) == [4, 8]
        assert Image.open(io.BytesIO(base64.b64decode(previews[0]["b64"]))).size == (64, 64)
    assert len(seen[-1][1]["outputs"]) == 2


def test_the_streamed_result_is_the_one_without_a_stream(flux: LiveServer) -> None:
    asked = body("flux", deterministic=True)
    streamed = events(flux.url, asked)[-1][1]
    plain = httpx.post(f"{flux.url}/generate", json=asked, timeout=60).json()
    assert streamed["outputs"] == plain["outputs"]


def test_a_pipeline_s_refusal_after_the_stream_began_is_an_error_event(flux: LiveServer) -> None:
    asked = body("flux", timeout_s=0.5, num_inference_steps=900)
    name, data = events(flux.url, asked)[-1]
    assert name == "error"
    assert data["error"]["code"] == "deadline_passed"
