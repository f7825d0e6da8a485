"""Choose between JSON and the file itself by the ``Accept`` header (RFC 9110, section 12.5.1)."""

from __future__ import annotations

from ..protocol.errors import InvalidRequest
from ..protocol.output_formats import FORMATS, Kind, OutputFormat

_JSON = ("application/json", "application/*", "*/*")


def choose(accept: str | None, wanted: OutputFormat | None, kind: Kind) -> tuple[bool, OutputFormat]:
    """Return true to reply with the file itself, and the output format.

    ``wanted`` is the request's ``output_format``. Only a header that names a file type gets a file: the common ``*/*``
    means JSON. Raises ``InvalidRequest`` if the header names only file types that the request cannot produce.
    """
    ranges = _parse(accept or "*/*")
    possible = [wanted] if wanted is not None else [format for format in FORMATS if FORMATS[format].holds == kind]
    best = max(possible, key=lambda format: _quality(_covering(format), ranges))
    quality, json_quality = _quality(_covering(best), ranges), _quality(_JSON, ranges)
    if quality > 0 and quality >= json_quality:
        return True, best
    if json_quality == 0 and any(pattern.startswith(("image/", "video/")) for pattern, q in ranges if q > 0):
        types = ", ".join(FORMATS[format].media_type for format in possible)
        raise InvalidRequest(f"The Accept header names no type that this request can make: {types}, {_JSON[0]}.")
    return False, possible[0]


def _covering(format: OutputFormat) -> tuple[str, ...]:
    """The media ranges that match a file of ``format``, the most specific first."""
    media_type = FORMATS[format].media_type
    return (media_type,) if FORMATS[format].holds is None else (media_type, media_type.partition("/")[0] + "/*")


def _quality(patterns: tuple[str, ...], ranges: list[tuple[str, float]]) -> float:
    """The quality of the first of ``patterns`` in the header, else 0."""
    for pattern in patterns:
        qualities = [quality for media_range, quality in ranges if media_range == pattern]
        if qualities:
            return max(qualities)
    return 0.0


def _parse(header: str) -> list[tuple[str, float]]:
    """The media ranges in ``header`` with their qualities; parameters other than q are ignored."""
    ranges = []
    for part in header.lower().split(","):
        pattern, *parameters = (piece.strip() for piece in part.split(";"))
        quality = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                quality = _number(value)
        ranges.append((pattern, quality))
    return ranges


def _number(text: str) -> float:
    try:
        return min(1.0, max(0.0, float(text)))
    except ValueError:
        return 0.0
