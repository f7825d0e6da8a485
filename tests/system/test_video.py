"""The embedded video model, served as any user serves it: one sentence in, a clip of it out."""

from __future__ import annotations

import io
from collections.abc import Iterator

import av
import httpx
import numpy as np
import pytest

from safelight.shapes.motion import Clip, judge_clip
from safelight.tests.live import LiveServer

from .asking import ask, picture

PROMPT = "a red circle moving right on a white background"
CLIP = Clip("red", "circle", "right", "white")


@pytest.fixture(scope="module")
def video() -> Iterator[LiveServer]:
    with LiveServer("shapes-video") as server:
        yield server.wait_ready()


@pytest.mark.parametrize("kind", ["mp4", "webm"])
def test_a_sentence_alone_makes_a_clip_that_shows_it(kind: str, video: LiveServer) -> None:
    asked = {"prompt": PROMPT, "seed": 1}
    answer = httpx.post(f"{video.url}/generate", json=asked, headers={"Accept": f"video/{kind}"}, timeout=60)
    assert (answer.status_code, answer.headers["content-type"]) == (200, f"video/{kind}"), answer.text
    with av.open(io.BytesIO(answer.content)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (64, 64, 8)
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert len(frames) == 17
    assert judge_clip(frames).matches(CLIP)


def test_frames_arrive_as_a_tensor(video: LiveServer) -> None:
    frames = picture(ask(video.url, {"prompt": PROMPT, "seed": 1, "output_format": "pt"}))
    assert frames.shape == (17, 3, 64, 64)
    assert judge_clip(frames).matches(CLIP)


def test_the_model_says_what_it_makes_when_nothing_is_asked(video: LiveServer) -> None:
    info = httpx.get(f"{video.url}/model_info").json()
    found = {name: info[name] for name in ("pipeline", "kind", "default_width", "default_num_frames", "default_fps")}
    assert found == {
        "pipeline": "WanPipeline",
        "kind": "video",
        "default_width": 64,
        "default_num_frames": 17,
        "default_fps": 8,
    }
