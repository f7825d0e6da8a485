"""The table of output formats: content, media type and suffixes.

How one is written is in ``worker/media/encoding.py``, and nothing else names a format.
"""

from __future__ import annotations

from typing import Literal

import msgspec

OutputFormat = Literal["png", "jpeg", "webp", "mp4", "webm", "pt"]
Kind = Literal["image", "video"]


class Format(msgspec.Struct, frozen=True):
    """``holds`` is ``None`` for a file of tensors, which any output can be; the first suffix is the usual one."""

    holds: Kind | None
    media_type: str
    suffixes: tuple[str, ...]


FORMATS: dict[OutputFormat, Format] = {
    "png": Format("image", "image/png", (".png",)),
    "jpeg": Format("image", "image/jpeg", (".jpg", ".jpeg")),
    "webp": Format("image", "image/webp", (".webp",)),
    "mp4": Format("video", "video/mp4", (".mp4",)),
    "webm": Format("video", "video/webm", (".webm",)),
    "pt": Format(None, "application/octet-stream", (".pt",)),
}
"""The first format of each kind is its default."""


def formats_of(kind: Kind) -> list[OutputFormat]:
    """The formats that the outputs of a model of this kind can have."""
    return [name for name, one in FORMATS.items() if one.holds in (kind, None)]
