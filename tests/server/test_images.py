"""A request's images are decoded to upright RGB, and invalid ones are refused before they cost anything."""

from __future__ import annotations

import base64
import contextlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from safelight.protocol.errors import InvalidRequest
from safelight.server.images import MOST_IMAGES, decode_text, read_images
from safelight.tests.effort import examples

LIMIT = 10_000


def picture(mode: str = "RGB", size: tuple[int, int] = (8, 4)) -> Image.Image:
    """Red above, blue below."""
    drawn = Image.new("RGB", size, "red")
    drawn.paste("blue", (0, size[1] // 2, *size))
    return drawn.convert(mode)


def file(drawn: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    written = io.BytesIO()
    drawn.save(written, format=kind, **options)
    return written.getvalue()


def pixels(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    (read,) = read_images([data], LIMIT)
    return np.frombuffer(bytes(read.rgb), np.uint8).reshape(read.height, read.width, 3)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_every_pixel_arrives(kind: str) -> None:
    assert np.array_equal(pixels(file(picture(), kind, lossless=True)), np.asarray(picture()))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_kinds_of_pixels_become_rgb(mode: str) -> None:
    assert np.array_equal(pixels(file(picture(mode))), np.asarray(picture(mode).convert("RGB")))


def test_sixteen_bits_are_not_cut_off_at_white() -> None:
    ramp = np.linspace(0, 65535, 64 * 4).astype(np.uint16).reshape(4, 64)
    assert np.array_equal(pixels(file(Image.fromarray(ramp)))[:, :, 0], (ramp >> 8).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_of_a_turned_camera_is_upright(orientation: int) -> None:
    upright = picture(size=(32, 16))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what undoes each orientation, as Pillow numbers it
    stored = upright.transpose(Image.Transpose(back[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = pixels(file(stored, "PNG", exif=exif))
    assert np.array_equal(seen, np.asarray(upright))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_a_format_that_is_not_listed_is_never_opened(kind: str) -> None:
    with pytest.raises(InvalidRequest, match="PNG, JPEG, WEBP"):
        read_images([file(picture(), kind)], LIMIT)


@pytest.mark.parametrize("data", [b"", b"x", b"\x89PNG\r\n\x1a\n", b"%PDF-1.4", b"<svg/>", b"\xff\xd8\xff"])
def test_a_body_without_a_picture_is_refused_in_words(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="PNG, JPEG, WEBP"):
        read_images([data], LIMIT)


@pytest.mark.parametrize("size", [(101, 100), (60_000, 60_000), (2**31 - 1, 2**31 - 2)])
def test_too_many_pixels_are_refused_by_the_header(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(InvalidRequest, match="pixels"):
        read_images([png_header(*size)], LIMIT)


def test_the_limit_holds_for_all_images_together() -> None:
    whole = file(picture(size=(100, 50)))
    assert len(read_images([whole, whole], LIMIT)) == 2
    with pytest.raises(InvalidRequest, match="10000 pixels together; these have 15000"):
        read_images([whole] * 3, LIMIT)
    with pytest.raises(InvalidRequest, match=f"up to {MOST_IMAGES}"):
        read_images([whole] * (MOST_IMAGES + 1), LIMIT)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_that_was_cut_off_is_refused(kind: str) -> None:
    whole = file(Image.effect_noise((64, 64), 90).convert("RGB"), kind)
    with pytest.raises(InvalidRequest, match="image"):
        read_images([whole[: len(whole) // 2]], LIMIT)


@pytest.mark.parametrize("size", [(1, 33), (330, 10)])
def test_a_strip_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InvalidRequest, match="32 times"):
        read_images([file(picture(size=size))], LIMIT)


def test_a_jpeg_of_a_thousand_scans_is_never_decoded() -> None:
    whole = file(picture(size=(64, 64)), "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    read_images([whole], LIMIT)
    with pytest.raises(InvalidRequest, match="scans"):
        read_images([whole[:-2] + last * 1000 + whole[-2:]], LIMIT)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("behind", [b"x", b"\xff\xda" * 100, np.random.default_rng(1).bytes(6_000_000)])
def test_a_jpeg_with_data_behind_its_end_is_read(behind: bytes, progressive: bool) -> None:
    """As of a phone that keeps a film there, in which any two bytes come by."""
    exif = Image.Exif()
    exif[0x010E] = "\u00ff\u00da" * 100  # and any within a segment
    whole = file(picture(size=(32, 32)), "JPEG", progressive=progressive, exif=exif, comment=b"\xff\xda" * 100)
    assert np.array_equal(pixels(whole + behind), pixels(whole))


def test_a_phone_s_photograph_with_a_second_picture_in_it_is_read() -> None:
    both = file(picture(size=(32, 32)), "MPO", save_all=True, append_images=[picture(size=(8, 8))])
    assert pixels(both).shape == (32, 32, 3)


def test_an_animation_is_refused() -> None:
    moving = file(picture(), "WEBP", save_all=True, append_images=[picture("L").convert("RGB")], duration=100)
    with pytest.raises(InvalidRequest, match="animation"):
        read_images([moving], LIMIT)


@settings(max_examples=examples(200, 20_000), deadline=None)
@given(st.binary(max_size=8), st.sampled_from(["PNG", "JPEG", "WEBP"]), st.integers(0, 400))
def test_broken_bytes_only_ever_raise_what_the_client_can_read(noise: bytes, kind: str, at: int) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    whole = file(picture(size=(16, 16)), kind, exif=exif)
    broken = whole[:at] + noise + whole[at + len(noise) :]
    with contextlib.suppress(InvalidRequest):
        read_images([broken], LIMIT)


@pytest.mark.parametrize("form", ["{}", "data:image/png;base64,{}", "DATA:;base64,{}", "data:image/png;a=b;base64,{}"])
def test_base64_and_data_uris_are_files(form: str) -> None:
    encoded = base64.b64encode(b"some file").decode()
    assert decode_text(form.format(encoded)) == b"some file"
    assert decode_text(form.format(encoded[:4] + "\n" + encoded[4:])) == b"some file"


@pytest.mark.parametrize("content", [b"\xfb\xef\xff", b"\xfb\xef\xff\xfe", b"\xfb\xef\xff\xfe\xfa", bytes(range(256))])
def test_base64_may_lack_its_padding_and_be_the_one_for_addresses(content: bytes) -> None:
    for encoded in (base64.b64encode(content), base64.urlsafe_b64encode(content)):
        for text in (encoded.decode(), encoded.decode().rstrip("=")):
            assert decode_text(text) == decode_text("data:image/png;base64," + text) == content


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("http://localhost/x.png", "fetches nothing"),
        ("HTTPS://example.com/x.png", "fetches nothing"),
        ("file:///etc/passwd", "fetches nothing"),
        ("/etc/passwd.png", "neither"),
        ("data:image/png,abc", "of the form"),
        ("data:image/png;base64,ä", "neither"),
        ("not base64!", "neither"),
        ("abcde", "neither"),
        ("ab=c", "neither"),
        ("ab==cd==", "neither"),
    ],
)
def test_an_image_is_never_an_address(text: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as refused:
        decode_text(text)
    assert refused.value.field == "image"
