"""Results: their bytes, their pictures, and how they show themselves in a notebook."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from PIL import Image

from safelight.client import Generation, Internal, Output, Preview
from safelight.client.endpoint import Endpoint

from .played_server import generation, png


def read(*seeds: int, data: bytes | None = None, format: str = "png") -> Generation:
    return Endpoint().generation(json.dumps(generation(*seeds, data=data, format=format)))


def test_a_reply_becomes_typed_values() -> None:
    result = read(7, 8)
    assert (result.id, result.model, result.weight_version, result.steps) == ("r1", "shapes", "initial", 4)
    assert [output.seed for output in result.outputs] == [7, 8]
    assert result.outputs[0].data == png()
    assert result.timings.total_s == 0.4


def test_a_result_that_spans_updates_has_all_versions_and_the_adapters_that_drew_it() -> None:
    own = {"nickname": "style", "component": "transformer", "strength": 0.5, "mode": "merge"}
    reported = {**generation(), "weight_version": "2", "weight_versions": ["1", "2"], "adapters": [own]}
    result = Endpoint().generation(json.dumps(reported))
    assert (result.weight_version, result.weight_versions) == ("2", ("1", "2"))
    assert [(one.nickname, one.component, one.strength, one.mode) for one in result.adapters] == [tuple(own.values())]


def test_a_field_of_a_newer_server_is_passed_over() -> None:
    assert Endpoint().generation(json.dumps({**generation(), "new": 1})).id == "r1"


@pytest.mark.parametrize("content", [b"<html>", b"{}", json.dumps({**generation(), "steps": "x"}).encode()])
def test_a_reply_that_is_not_a_result_raises(content: bytes) -> None:
    with pytest.raises(Internal, match="is not that of a Safelight server"):
        Endpoint().generation(content)


def test_a_result_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        read().id = "other"  # type: ignore[misc]


def test_a_picture_opens() -> None:
    result = read()
    assert result.image.size == (8, 8)
    assert result.outputs[0].image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["mp4", "pt"])
def test_a_result_that_is_not_a_picture_does_not_open_as_one(format: str) -> None:
    with pytest.raises(ValueError, match="save"):
        _ = read(data=b"...", format=format).image


def test_saving_writes_the_bytes_that_came(tmp_path: Path) -> None:
    assert read().outputs[0].save(tmp_path / "out.png").read_bytes() == png()
    assert read(data=b"clip", format="mp4").outputs[0].save(tmp_path / "out.png").read_bytes() == b"clip"


@pytest.mark.parametrize(("suffix", "format"), [(".jpg", "JPEG"), (".webp", "WEBP")])
def test_saving_under_another_suffix_converts(tmp_path: Path, suffix: str, format: str) -> None:
    path = read().outputs[0].save(tmp_path / f"out{suffix}")
    with Image.open(path) as image:
        assert image.format == format


def test_a_notebook_shows_a_png_as_itself_and_as_html() -> None:
    output = read().outputs[0]
    bundle = output._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]) == png() == output._repr_png_()
    assert 'src="data:image/png;base64,' in bundle["text/html"]
    assert bundle["text/plain"] == repr(output)


@pytest.mark.parametrize(
    ("format", "element"), [("mp4", "<video"), ("webm", "<video"), ("webp", "<img"), ("pt", "<code>Output(pt")]
)
def test_a_notebook_shows_every_format(format: str, element: str) -> None:
    output = read(data=b"...", format=format).outputs[0]
    assert output._repr_html_().startswith(element)
    assert output._repr_png_() is None
    assert set(output._repr_mimebundle_()) == {"text/plain", "text/html"}


def test_a_notebook_shows_all_outputs_with_their_seeds() -> None:
    html = read(7, 8)._repr_html_()
    assert html.count("<img") == 2
    assert "seed 7" in html
    assert "seed 8" in html


def test_a_model_name_is_escaped_in_html() -> None:
    body = {**generation(), "model": "<script>"}
    assert "<script>" not in Endpoint().generation(json.dumps(body))._repr_html_()


def test_no_repr_prints_the_bytes() -> None:
    output = Output(data=b"x" * 100_000, format="png", seed=1, width=8, height=8)
    preview = Preview(output=0, step=1, steps=4, data=b"x" * 100_000)
    assert len(repr(output)) < 200
    assert len(repr(preview)) < 200
    assert len(repr(read(1, 2))) < 500
