"""What the client wants the answer to be: JSON, or the file itself (RFC 9110, section 12.5.1)."""

from __future__ import annotations

from ..protocol.errors import InvalidRequest
from ..protocol.output_formats import FORMATS, Kind, OutputFormat

_JSON = ("application/json", "application/*", "*/*")


def choose(accept: str | None, wanted: OutputFormat | None, kind: Kind) -> tuple[bool, OutputFormat]:
    """Whether to answer with the file itself, and the format to make.

    ``wanted`` is the request's ``output_format``. A file goes only to those who name one: everybody's ``*/*`` means
    JSON. Raises ``InvalidRequest`` when the header names only files that this request cannot make.
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
    """The media ranges that ask for a file of ``format``, the most specific first."""
    media_type = FORMATS[format].media_type
    return (media_type,) if FORMATS[format].holds is None else (media_type, media_type.partition("/")[0] + "/*")


def _quality(patterns: tuple[str, ...], ranges: list[tuple[str, float]]) -> float:
    """The quality by the first of ``patterns`` that the header has, 0 when it has none."""
    for pattern in patterns:
        qualities = [quality for given, quality in ranges if given == pattern]
        if qualities:
            return max(qualities)
    return 0.0


def _parse(header: str) -> list[tuple[str, float]]:
    """The media ranges in ``header`` with their qualities; parameters other than q are not looked at."""
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
