"""A request gets the checkpoint's own defaults for what it leaves out, and none of them is ignored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safelight.protocol.config import Config
from safelight.protocol.errors import StartFailed
from safelight.protocol.generation import Generate, Sample
from safelight.tests.tiny import save
from safelight.worker.model.model import Model, load_model
from safelight.worker.requests.sample import SampleRun


@pytest.fixture
def published(tmp_path: Path) -> Callable[[Any], Model]:
    """The tiny Wan with a ``safelight.json`` of this content."""

    def load(content: Any) -> Model:
        directory = save("wan", tmp_path)
        (directory / "safelight.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return load_model(Config(model=str(directory), device="cpu"))

    return load


def test_a_request_gets_what_it_leaves_out(published: Callable[[Any], Model]) -> None:
    defaults = {"width": 48, "height": 32, "num_frames": 9, "max_sequence_length": 16}
    model = published({"defaults": defaults, "fps": 8})
    request = Generate(request_id="a", samples=[Sample("a star", 1)], num_frames=5)
    arguments = SampleRun(model, request, 0, lambda *_: None, lambda _: None).arguments()
    assert {name: arguments[name] for name in defaults} == defaults | {"num_frames": 5}
    info = model.info()
    found = (info.default_width, info.default_height, info.default_num_frames, info.default_fps)
    assert found == (48, 32, 9, 8)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ({"default": {}}, "cannot be read"),
        ({"fps": "8"}, "cannot be read"),
        ({"defaults": {"widht": 64}}, "widht"),
        ({"defaults": {"width": "64"}}, "width = '64'"),
        ({"defaults": {"width": -64}}, "width = -64"),
        ({"defaults": {"num_inference_steps": 0}}, "num_inference_steps = 0"),
        ({"fps": -8}, "cannot be read"),
    ],
)
def test_a_wrong_file_ends_the_start(content: Any, words: str, published: Callable[[Any], Model]) -> None:
    with pytest.raises(StartFailed, match=words):
        published(content)
