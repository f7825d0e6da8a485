"""Images that a request brings along: files in, checked rows of RGB out.

A file's format and size are read from its header before anything is decoded. Nothing is ever fetched: what a request
does not contain, it does not have.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from collections.abc import Sequence

from PIL import Image as pillow
from PIL import ImageOps

from ..protocol.codec import Buffer
from ..protocol.errors import InvalidRequest
from ..protocol.messages import Image

FORMATS = ("PNG", "JPEG", "WEBP")
"""The formats that are read; Pillow is not asked for any other."""

MOST_IMAGES = 16
_FIELD = "image"
_DATA_URI = re.compile(r"data:(?P<type>[^;,]*)(;[^;,]*)*;base64,", re.IGNORECASE)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


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
    try:
        return base64.b64decode("".join(text.split()), validate=True)
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pillow.DecompressionBombWarning)  # the limit is ours, and comes next
            picture = pillow.open(io.BytesIO(file), formats=FORMATS)
    except pillow.DecompressionBombError:
        raise InvalidRequest("The image has far too many pixels.", field=_FIELD) from None
    except (OSError, ValueError, SyntaxError):
        raise InvalidRequest(f"image must be a file of the format {', '.join(FORMATS)}.", field=_FIELD) from None
    if getattr(picture, "n_frames", 1) > 1:
        raise InvalidRequest("image must be a single picture, not an animation.", field=_FIELD)
    return picture


def _decode(picture: pillow.Image) -> Image:
    """Every pixel, turned as the camera was held (EXIF), in RGB; transparency is dropped, as diffusers does."""
    try:
        upright = ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError, IndexError, EOFError, pillow.DecompressionBombError) as error:
        raise InvalidRequest(f"The image cannot be decoded ({error}); is it complete?", field=_FIELD) from None
    return Image(upright.width, upright.height, Buffer(upright.tobytes()))
