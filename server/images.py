"""Check and decode a request's images to rows of RGB.

A file's format and size are read from its header before anything is decoded. Nothing is ever fetched: what a request
does not contain, it does not have.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image as pillow

from ..protocol.codec import Buffer
from ..protocol.errors import InvalidRequest
from ..protocol.generation import Image

FORMATS = ("PNG", "JPEG", "WEBP")
"""The formats that are read; Pillow is not asked for any other."""

MOST_IMAGES = 16

LONGEST = 32
"""How many times as long as wide an image may be."""

_FIELD = "image"
_DATA_URI = re.compile(r"data:[^;,]*(;[^;,]*)*;base64,", re.IGNORECASE)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_PLAIN = dict.fromkeys(map(ord, " \t\r\n")) | {ord("-"): "+", ord("_"): "/"}
"""Translates base64's URL-safe alphabet to the standard one (RFC 4648, section 5)."""

_BYTES_PER_PIXEL = 10
_BYTES_BESIDE = 4 << 20
"""A file may have so many bytes for each pixel, where 16 bits of four channels take eight, and so many beside them."""

_MOST_SCANS = 64
"""Scans of a JPEG: each takes time for every pixel, and a few bytes in the file. A progressive one has about ten."""

_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # but for those inside a scan
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = 0xD8, 0xD9, 0xDA
_WITHOUT_LENGTH = (0x01, _START_OF_IMAGE)

_BROKEN = (OSError, ValueError, SyntaxError, IndexError, TypeError)
"""Exceptions of Pillow for malformed files."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: pillow.Transpose.FLIP_LEFT_RIGHT,
    3: pillow.Transpose.ROTATE_180,
    4: pillow.Transpose.FLIP_TOP_BOTTOM,
    5: pillow.Transpose.TRANSPOSE,
    6: pillow.Transpose.ROTATE_270,
    7: pillow.Transpose.TRANSVERSE,
    8: pillow.Transpose.ROTATE_90,
}
"""The transposition that sets a picture upright, by its Exif orientation (CIPA DC-008, tag 0x0112)."""

pillow.MAX_IMAGE_PIXELS = None  # the limit is ours, and holds for all the images of a request together


def decode_text(text: str) -> bytes:
    """The file in a data URI or in plain base64. Raises ``InvalidRequest`` for anything else, as for an address."""
    if _ADDRESS.match(text):
        raise InvalidRequest(
            "image must be the picture itself, as base64 or a data URI; this server fetches nothing.", field=_FIELD
        )
    if text[:5].lower() == "data:":
        uri = _DATA_URI.match(text[:1000])
        if uri is None:
            raise InvalidRequest("image must be a data URI of the form data:image/png;base64,…", field=_FIELD)
        text = text[uri.end() :]
    plain = text.translate(_PLAIN).rstrip("=")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("image must be base64 or a data URI, and it is neither.", field=_FIELD) from None


def read_images(sources: Sequence[str | bytes], max_pixels: int) -> list[Image]:
    """The pictures in files, or in text as :func:`decode_text` takes it, upright and in RGB.

    Raises ``InvalidRequest`` for what is none, and for more than ``max_pixels`` in all of them.
    """
    if len(sources) > MOST_IMAGES:
        raise InvalidRequest(f"A request may have up to {MOST_IMAGES} images, not {len(sources)}.", field=_FIELD)
    opened = [_open(decode_text(source) if isinstance(source, str) else source) for source in sources]
    pixels = sum(picture.width * picture.height for picture in opened)
    if pixels > max_pixels:
        raise InvalidRequest(
            f"The images of a request may have {max_pixels} pixels together; these have {pixels}.", field=_FIELD
        )
    return [_decode(picture) for picture in opened]


def _open(file: bytes) -> pillow.Image:
    """The picture with its header read and nothing more."""
    try:
        picture = pillow.open(io.BytesIO(file), formats=FORMATS)
        # a phone's JPEG may contain further pictures; the first is the photograph
        frames = getattr(picture, "n_frames", 1) if picture.format in ("PNG", "WEBP") else 1
    except _BROKEN:
        raise InvalidRequest(f"image must be a file of the format {', '.join(FORMATS)}.", field=_FIELD) from None
    if frames > 1:
        raise InvalidRequest("image must be a single picture, not an animation.", field=_FIELD)
    if picture.format in ("JPEG", "MPO") and _scans(file) > _MOST_SCANS:
        raise InvalidRequest("The image has far too many scans.", field=_FIELD)
    allowed = _BYTES_BESIDE + _BYTES_PER_PIXEL * picture.width * picture.height
    if picture.format in ("PNG", "WEBP") and len(file) > allowed:  # a phone's JPEG may have a film behind its end
        raise InvalidRequest("The image's file is far too large for its pixels.", field=_FIELD)
    if max(picture.size) > LONGEST * min(picture.size):
        raise InvalidRequest(f"image may be up to {LONGEST} times as long as wide.", field=_FIELD)
    return picture


def _scans(jpeg: bytes) -> int:
    """The scans of a JPEG (ITU-T T.81, annex B) up to its end; behind that a phone may keep whole films."""
    scans = at = 0
    while (marker := _MARKER.search(jpeg, at)) is not None and scans <= _MOST_SCANS:
        kind, at = marker[1][0], marker.end()
        if kind == _END_OF_IMAGE:
            break
        scans += kind == _START_OF_SCAN
        if kind not in _WITHOUT_LENGTH:
            at += int.from_bytes(jpeg[at : at + 2])
    return scans


def _decode(picture: pillow.Image) -> Image:
    """Every pixel, turned as the camera was held, in RGB; transparency is dropped, as diffusers does."""
    try:
        turn = _UPRIGHT.get(picture.getexif().get(_ORIENTATION, 1))
        upright = _in_rgb(picture) if turn is None else _in_rgb(picture).transpose(turn)
    except (*_BROKEN, EOFError) as error:
        raise InvalidRequest(f"The image cannot be decoded ({error}); is it complete?", field=_FIELD) from None
    return Image(upright.width, upright.height, Buffer(upright.tobytes()))


def _in_rgb(picture: pillow.Image) -> pillow.Image:
    """Pillow would cut 16 bits off at 255 and make them white; what counts are the upper ones."""
    if picture.mode.startswith("I"):
        picture = pillow.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return picture.convert("RGB")
