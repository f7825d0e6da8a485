"""Encode and decode pictures. Pillow is imported lazily, so that the command line starts without it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from PIL.Image import Image

Picture: TypeAlias = "str | bytes | Path | Image"
"""An input picture: base64 or a data URI, a file's bytes, its path, or a Pillow image."""


def open_picture(data: bytes) -> Image:
    from PIL import Image as pillow

    image = pillow.open(io.BytesIO(data))
    image.load()
    return image


def encode_pictures(pictures: Picture | Sequence[Picture]) -> str | list[str]:
    """Encode ``pictures`` for the ``image`` field: one base64 string, or a list of them."""
    if isinstance(pictures, Sequence) and not isinstance(pictures, str | bytes):
        return [_encode(picture) for picture in pictures]
    return _encode(pictures)


def _encode(picture: Picture) -> str:
    if isinstance(picture, str):
        return picture
    if isinstance(picture, Path):
        picture = picture.read_bytes()
    if not isinstance(picture, bytes):
        file = io.BytesIO()
        picture.save(file, format="PNG")
        picture = file.getvalue()
    return base64.b64encode(picture).decode()
