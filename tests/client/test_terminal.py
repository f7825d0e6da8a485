"""The terminal's output while a request runs."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from rich.console import Console

from safelight.client import Preview, Progress, Queued, UpdateProgress
from safelight.client.terminal import GenerationView, PushView, blocks, server_table

from .played_server import png
from .test_cli import INFO


def events_shown(*, terminal: bool) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100)
    with GenerationView(console, outputs=2) as view:
        view.show(Queued(3))
        for output in (0, 1):
            view.show(Progress(output, 2, 4))
        view.show(Preview(0, 2, 4, png()))
        if view._live:
            view._live.refresh()
    return file.getvalue()


def test_a_terminal_shows_the_steps_of_all_outputs_and_the_picture() -> None:
    text = events_shown(terminal=True)
    assert "4/8" in text
    assert "▀" in text


def test_a_pipe_gets_nothing() -> None:
    assert events_shown(terminal=False) == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_push_has_a_bar_for_each_module_on_a_terminal_alone(terminal: bool) -> None:
    file = io.StringIO()
    with PushView(Console(file=file, force_terminal=terminal, width=100), ["transformer", "vae"]) as view:
        view.show("vae", UpdateProgress(3_000_000, 12_000_000))
    text = file.getvalue()
    assert ("transformer" in text, "3.0/12.0 MB" in text) == (terminal, terminal)
    assert bool(text) == terminal


def test_a_half_block_holds_the_pixel_above_and_the_one_below() -> None:
    picture = Image.new("RGB", (2, 2))
    for x, y, colour in ((0, 0, "red"), (1, 0, "lime"), (0, 1, "blue"), (1, 1, "white")):
        picture.paste(colour, (x, y, x + 1, y + 1))
    segments = blocks(picture, columns=2).segments
    assert [segment.text for segment in segments] == ["▀", "▀", "\n"]
    assert [str(segment.style) for segment in segments[:2]] == ["#ff0000 on #0000ff", "#00ff00 on #ffffff"]


def test_info_says_every_default_that_takes_effect() -> None:
    model = INFO["models"][0] | {
        "default_num_frames": 17,
        "default_fps": 8,
        "arguments": {"num_inference_steps": {"default": 28}, "max_sequence_length": {"default": 77}},
        "deterministic_defaults": {"max_sequence_length": 512},
    }
    file = io.StringIO()
    Console(file=file, width=200).print(server_table("http://server", INFO | {"models": [model]}))
    drawn = "64x64, 17 frames at 8 a second, 28 steps, 77 tokens of text (max_sequence_length 512 if deterministic)"
    assert drawn in file.getvalue()
