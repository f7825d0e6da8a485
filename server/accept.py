"""What the client wants the answer to be: JSON, or the file itself (RFC 9110, section 12.5.1)."""

from __future__ import annotations

from typing import Literal

from ..protocol.errors import InvalidRequest
from ..protocol.messages import OutputFormat
from .limits import FORMATS

MEDIA_TYPES: dict[OutputFormat, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "mp4": "video/mp4",
    "pt": "application/octet-stream",
}
JSON = "application/json"


def choose(
    accept: str | None, wanted: OutputFormat | None, kind: Literal["image", "video"]
) -> tuple[bool, OutputFormat]:
    """Whether to answer with the file itself, and the format to make.

    ``wanted`` is the request's ``output_format``. Raises ``InvalidRequest`` when the header accepts nothing that can
    be answered.
    """
    ranges = _parse(accept or "*/*")
    formats = (wanted,) if wanted is not None else FORMATS[kind]
    ranked = sorted(formats, key=lambda format: _quality(MEDIA_TYPES[format], ranges, named=True), reverse=True)
    best = ranked[0]
    file_quality, json_quality = _quality(MEDIA_TYPES[best], ranges, named=True), _quality(JSON, ranges)
    if file_quality > 0 and file_quality >= json_quality:
        return True, best
    if json_quality > 0 or not any(_is_media(pattern) and quality > 0 for pattern, quality in ranges):
        return False, formats[0]
    possible = ", ".join([JSON, *(MEDIA_TYPES[format] for format in formats)])
    raise InvalidRequest(f"The Accept header takes nothing that this request can make: {possible}.", field="Accept")


def _parse(header: str) -> list[tuple[str, float]]:
    """The media ranges in ``header`` with their qualities; parameters other than q are not looked at."""
    ranges = []
    for part in header.split(","):
        pattern, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                quality = _number(value)
        if pattern:
            ranges.append((pattern, quality))
    return ranges


def _number(text: str) -> float:
    try:
        return min(1.0, max(0.0, float(text)))
    except ValueError:
        return 0.0


def _quality(media_type: str, ranges: list[tuple[str, float]], *, named: bool = False) -> float:
    """The quality of ``media_type`` by the most specific range that covers it; ``named`` leaves out ``*/*``.

    Everybody's ``*/*`` means JSON: a file is sent only to those who ask for one.
    """
    patterns = [media_type, media_type.partition("/")[0] + "/*"]
    if media_type == JSON or not named:
        patterns.append("*/*")
    for pattern in patterns:
        qualities = [quality for range_, quality in ranges if range_ == pattern]
        if qualities:
            return max(qualities)
    return 0.0


def _is_media(pattern: str) -> bool:
    return pattern.startswith(("image/", "video/")) or pattern == MEDIA_TYPES["pt"]
