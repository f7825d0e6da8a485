"""Requests that bring an image, through the whole system, beside the diffusers pipeline that is there for them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import diffusers
import httpx
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from safelight.tests.live import LiveServer
from safelight.tests.serving import Servers, by_family
from safelight.tests.tiny.wan import build_wan_from_image
from safelight.worker.requests.input_images import fitting

from .asking import ask, ask_together, load_plain, picture

pytestmark = pytest.mark.usefixtures("one_thread")

PARTNERS = {
    "flux": ("FluxImg2ImgPipeline", {"num_inference_steps": 4, "extra": {"strength": 0.75, "max_sequence_length": 64}}),
    "sd15": ("StableDiffusionImg2ImgPipeline", {"num_inference_steps": 4, "extra": {"strength": 0.75}}),
    "sdxl": ("StableDiffusionXLImg2ImgPipeline", {"num_inference_steps": 4, "extra": {"strength": 0.75}}),
    "ltx": (
        "LTXImageToVideoPipeline",
        {"num_inference_steps": 2, "num_frames": 9, "extra": {"max_sequence_length": 64}},
    ),
}
"""Families that make something from text, with the pipeline that diffusers has for images on their components."""


def drawing(seed: int = 0, size: tuple[int, int] = (64, 64)) -> Image.Image:
    coarse = torch.randint(256, (4, 4, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(coarse.numpy()).resize(size, Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def body(index: int, options: dict[str, Any], **changes: Any) -> dict[str, Any]:
    asked = {"prompt": ("a red circle", "two blue squares", "a star")[index % 3], "seed": 100 + index}
    image = base64.b64encode(png(drawing(index))).decode()
    return {"image": image, "output_format": "pt", **asked, **options, **changes}


def plain(pipeline: Any, asked: dict[str, Any], image: Any, **size: int) -> torch.Tensor:
    given = {name: asked[name] for name in ("prompt", "num_inference_steps", "num_frames") if name in asked}
    generator = torch.Generator("cpu").manual_seed(asked["seed"])
    output = pipeline(**given, **asked["extra"], **size, image=image, generator=generator, output_type="pt")
    found: torch.Tensor = next(output[name] for name in ("images", "frames") if name in output)[0]
    return found


@pytest.mark.parametrize("family", by_family(*PARTNERS))
def test_images_are_drawn_over_as_diffusers_does_on_the_same_components(
    family: str, checkpoint: Callable[[str], Path], servers: Servers
) -> None:
    name, options = PARTNERS[family]
    base = load_plain(checkpoint(family))
    pipeline = getattr(diffusers, name).from_pipe(base)
    size = {"width": 64, "height": 64} if family in ("flux", "ltx") else {}
    bodies = [body(index, options) | ({"width": 64, "height": 64} if family == "ltx" else {}) for index in range(4)]
    expected = [plain(pipeline, asked, drawing(index), **size) for index, asked in enumerate(bodies)]
    server = servers(family)
    assert httpx.get(f"{server.url}/model_info").json()["image_task"]["pipeline"] == name
    assert torch.equal(picture(ask(server.url, bodies[1])), expected[1]), "alone"
    answers = ask_together(server.url, bodies)
    assert torch.equal(picture(ask(server.url, bodies[0] | {"deterministic": True})), expected[0]), "deterministic"
    without = ask(server.url, {**bodies[0], "image": None, "extra": {}, "width": 64, "height": 64})
    worst = max((picture(a.json()) - e).abs().max().item() for a, e in zip(answers, expected, strict=True))
    assert worst <= 1e-4
    assert (picture(without) - expected[0]).abs().max() > 1e-3, "text alone is something else"


@pytest.fixture(scope="module")
def from_image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, Path]]:
    """A server of a model that makes clips from an image, and from nothing less."""
    directory = tmp_path_factory.mktemp("wan") / "wan-from-image"
    build_wan_from_image().save_pretrained(directory, safe_serialization=True)
    with LiveServer(directory, ["--threads", "1"]) as server:
        yield server.wait_ready(), directory


CLIP = {"num_inference_steps": 2, "num_frames": 5, "extra": {"max_sequence_length": 64}}


def test_a_clip_goes_on_from_an_image_in_its_proportions(from_image: tuple[LiveServer, Path]) -> None:
    server, directory = from_image
    asked = body(0, CLIP, width=64, height=32, deterministic=True)
    expected = plain(load_plain(directory), asked, drawing(0), width=64, height=32)
    assert torch.equal(picture(ask(server.url, asked)), expected)
    tall = base64.b64encode(png(drawing(0, (64, 128)))).decode()
    assert picture(ask(server.url, asked | {"height": None, "image": tall})).shape[-2:] == (128, 64)


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "h264"), ("webm", "vp9")])
def test_a_clip_is_a_file_of_the_kind_that_was_asked_for(
    kind: str, codec: str, from_image: tuple[LiveServer, Path]
) -> None:
    server, _ = from_image
    asked = body(0, CLIP, width=64, height=32, output_format=None, fps=12)
    answer = httpx.post(f"{server.url}/generate", json=asked, headers={"Accept": f"video/{kind}"}, timeout=60)
    assert (answer.status_code, answer.headers["content-type"]) == (200, f"video/{kind}")
    with av.open(io.BytesIO(answer.content)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height) == (codec, 64, 32)
        assert stream.average_rate == 12
        assert len(list(container.decode(stream))) == 5


def test_a_model_that_needs_an_image_says_so(from_image: tuple[LiveServer, Path]) -> None:
    server, _ = from_image
    answer = httpx.post(f"{server.url}/generate", json={"prompt": "a red circle"})
    assert answer.status_code == 400
    assert answer.json()["error"]["field"] == "image"
    assert "needs an image" in answer.json()["error"]["message"]


def test_every_way_to_send_an_image_gives_the_same_picture(flux: LiveServer) -> None:
    options = PARTNERS["flux"][1]
    asked = body(1, options)
    expected = picture(ask(flux.url, asked))
    assert torch.equal(picture(ask(flux.url, asked | {"image": "data:image/png;base64," + asked["image"]})), expected)
    fields = {name: value if isinstance(value, str) else json.dumps(value) for name, value in asked.items()}
    del fields["image"]
    for name in ("image", "image[]"):
        files = {name: ("photo.png", png(drawing(1)), "image/png")}
        answer = httpx.post(f"{flux.url}/generate", data=fields, files=files, timeout=60)
        assert answer.status_code == 200, answer.text
        assert torch.equal(picture(answer.json()), expected)


def test_a_large_image_is_drawn_over_at_the_size_that_the_model_is_made_for(flux: LiveServer) -> None:
    large = base64.b64encode(png(drawing(1, (512, 256)))).decode()
    made = ask(flux.url, body(1, PARTNERS["flux"][1], image=large))["outputs"][0]
    info = httpx.get(f"{flux.url}/model_info").json()
    limit = info["default_width"] * info["default_height"]
    assert limit < 512 * 256
    assert (made["width"], made["height"]) == fitting(
        (512, 256), (None, None), info["size_multiple"], limit, enlarge=False
    )
    assert made["width"] == 2 * made["height"]


@pytest.mark.parametrize("family", by_family("flux", "sd15"))
def test_progress_counts_the_steps_that_are_taken(family: str, servers: Servers) -> None:
    steps = progress(servers(family).url, body(1, PARTNERS[family][1], stream=True))
    assert steps == [(1, 3), (2, 3), (3, 3)], "three of four steps are left at strength 0.75"


def progress(url: str, asked: dict[str, Any]) -> list[tuple[int, int]]:
    steps = []
    with httpx.stream("POST", f"{url}/generate", json=asked, timeout=60) as answer:
        event = ""
        for line in answer.iter_lines():
            event = line.removeprefix("event: ") if line.startswith("event: ") else event
            if line.startswith("data: ") and event == "progress":
                reported = json.loads(line.removeprefix("data: "))
                steps.append((reported["step"], reported["steps"]))
    return steps


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"image": "http://127.0.0.1/x.png"}, "image", "fetches nothing"),
        ({"image": "AAAA"}, "image", "PNG, JPEG, WEBP"),
        ({"image": []}, "image", "between 1 and"),
        ({"image": [body(0, {})["image"]] * 2}, "image", "takes one image"),
        ({"extra": {"strength": 1.5}}, "extra.strength", "between 0 and 1"),
        ({"extra": {"strength": "much"}}, "extra.strength", "of type float"),
    ],
)
def test_a_bad_image_request_is_a_400_that_names_the_field(
    changes: dict[str, Any], field: str, words: str, flux: LiveServer
) -> None:
    answer = httpx.post(f"{flux.url}/generate", json=body(0, PARTNERS["flux"][1]) | changes)
    assert (answer.status_code, answer.json()["error"].get("field")) == (400, field), answer.text
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "files", "field"),
    [
        ({"prompt": "a", "seed": "four"}, {}, "seed"),
        ({"prompt": "a"}, {"mask": b"x"}, "mask"),
        ({"seed": "4"}, {}, "prompt"),
        ({"prompt": "a", "unknown": "1"}, {}, "unknown"),
    ],
)
def test_a_bad_form_names_the_field(
    fields: dict[str, str], files: dict[str, bytes], field: str, flux: LiveServer
) -> None:
    parts = {name: (None, value) for name, value in fields.items()} | {n: ("f", data) for n, data in files.items()}
    answer = httpx.post(f"{flux.url}/generate", files=parts)
    assert (answer.status_code, answer.json()["error"].get("field")) == (422, field), answer.text


def test_a_form_that_breaks_off_or_has_another_charset_is_refused(flux: LiveServer) -> None:
    whole = b'--B\r\ncontent-disposition: form-data; name="prompt"\r\n\r\na star\r\n--B--\r\n'
    for content, kind in ((whole[:-8], "boundary=B"), (whole, "boundary=B; charset=utf-7"), (whole, "a=b")):
        headers = {"content-type": f"multipart/form-data; {kind}"}
        answer = httpx.post(f"{flux.url}/generate", content=content, headers=headers)
        assert answer.status_code == 422, answer.text


@pytest.mark.xdist_group("flux2")
def test_a_pipeline_s_refusal_of_an_image_is_a_400_in_its_own_words(servers: Servers) -> None:
    small = base64.b64encode(png(drawing(0, (8, 8)))).decode()
    asked = body(0, {"num_inference_steps": 2}, image=small)
    answer = httpx.post(f"{servers('flux2').url}/generate", json=asked, timeout=60)
    assert answer.status_code == 400, answer.text
    assert "64" in answer.json()["error"]["message"]


@pytest.mark.xdist_group("pixart")
def test_a_model_with_no_way_for_images_says_why(servers: Servers) -> None:
    answer = httpx.post(f"{servers('pixart').url}/generate", json=body(0, {}))
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "image")
    assert "no pipeline for images" in answer.json()["error"]["message"]


@pytest.mark.xdist_group("flux2")
def test_several_images_make_one_picture_where_the_pipeline_takes_them(
    checkpoint: Callable[[str], Path], servers: Servers
) -> None:
    images = [base64.b64encode(png(drawing(index))).decode() for index in range(2)]
    options = {"num_inference_steps": 2, "width": 64, "height": 64, "guidance_scale": 1.0, "extra": {}}
    url = servers("flux2").url
    both = load(base64.b64decode(ask(url, body(0, options, image=images))["outputs"][0]["b64"]))["t"]
    one = picture(ask(url, body(0, options, image=images[0])))
    expected = plain(load_plain(checkpoint("flux2")), body(0, options) | {"extra": {"guidance_scale": 1.0}},
                     [drawing(0), drawing(1)], width=64, height=64)  # fmt: skip
    assert torch.equal(both, expected)
    assert not torch.equal(both, one)


@pytest.mark.xdist_group("flux")
def test_two_ranks_draw_over_an_image_as_one_does(checkpoint: Callable[[str], Path], servers: Servers) -> None:
    name, options = PARTNERS["flux"]
    pipeline = getattr(diffusers, name).from_pipe(load_plain(checkpoint("flux")))
    bodies = [body(index, options) for index in range(3)]
    together = [picture(answer.json()) for answer in ask_together(servers("flux", "--tp", "2").url, bodies)]
    for index, found in enumerate(together):
        expected = plain(pipeline, bodies[index], drawing(index), width=64, height=64)
        assert (found - expected).abs().max() <= 1e-4
