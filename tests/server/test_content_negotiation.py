"""The Accept header decides between JSON and the file itself."""

from __future__ import annotations

from typing import Literal

import pytest

from safelight.protocol.errors import InvalidRequest
from safelight.protocol.output_formats import OutputFormat
from safelight.server.content_negotiation import choose

Kind = Literal["image", "video"]


@pytest.mark.parametrize(
    ("accept", "wanted", "kind", "expected"),
    [
        (None, None, "image", (False, "png")),
        ("", None, "image", (False, "png")),
        (None, None, "video", (False, "mp4")),
        ("*/*", None, "image", (False, "png")),
        ("application/json", "webp", "image", (False, "webp")),
        ("text/html", None, "image", (False, "png")),
        ("image/png", None, "image", (True, "png")),
        ("IMAGE/PNG", None, "image", (True, "png")),
        ("image/jpeg", None, "image", (True, "jpeg")),
        ("image/webp;q=1.0", None, "image", (True, "webp")),
        ("image/*", None, "image", (True, "png")),
        ("image/*", "jpeg", "image", (True, "jpeg")),
        ("image/*", "pt", "image", None),
        ("image/png, */*;q=0.1", None, "image", (True, "png")),
        ("image/png;q=0.1, application/json", None, "image", (False, "png")),
        ("image/png;q=0.5, image/webp;q=0.9", None, "image", (True, "webp")),
        ("image/*;q=0.5, image/jpeg", None, "image", (True, "jpeg")),
        ("image/*, image/png;q=0", None, "image", (True, "jpeg")),
        ("image/png;q=nonsense, */*", None, "image", (False, "png")),
        ("image/png", "jpeg", "image", None),
        ("image/png, */*", "jpeg", "image", (False, "jpeg")),
        ("video/mp4", None, "image", None),
        ("video/mp4", None, "video", (True, "mp4")),
        ("video/*", None, "video", (True, "mp4")),
        ("video/webm", None, "video", (True, "webm")),
        ("video/*", "webm", "video", (True, "webm")),
        ("image/png", None, "video", None),
        ("application/octet-stream", "pt", "image", (True, "pt")),
        ("application/octet-stream", None, "image", (False, "png")),
        (";;,,q=;", None, "image", (False, "png")),
    ],
)
def test_the_best_accepted_type_is_chosen(
    accept: str | None, wanted: OutputFormat | None, kind: Kind, expected: tuple[bool, OutputFormat] | None
) -> None:
    if expected is None:
        with pytest.raises(InvalidRequest, match="Accept header"):
            choose(accept, wanted, kind)
    else:
        assert choose(accept, wanted, kind) == expected
