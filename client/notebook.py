"""HTML of outputs in a notebook: a picture as ``<img>``, a clip as ``<video>``, a tensor as text."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from ..protocol.output_formats import FORMATS, OutputFormat

SMALL = 256
"""Narrower pictures are enlarged to this width in pixels, without smoothing."""


def element(data: bytes, format: OutputFormat, width: int, text: str) -> str:
    """The HTML element of an output, with the bytes inline; ``text`` describes it."""
    kind = FORMATS[format]
    if kind.holds is None:
        return f"<code>{escape(text)}</code>"
    style = "image-rendering: pixelated" if width < SMALL else ""
    source = f'src="data:{kind.media_type};base64,{base64.b64encode(data).decode()}" width="{max(width, SMALL)}"'
    if kind.holds == "video":
        return f'<video {source} style="{style}" controls loop autoplay muted playsinline></video>'
    return f'<img {source} style="{style}" alt="{text}">'


def gallery(figures: Sequence[tuple[str, str]], about: str) -> str:
    """Elements side by side, each with its caption, and a line ``about`` them."""
    shown = "".join(
        f'<figure style="margin: 0">{html}<figcaption>{caption}</figcaption></figure>' for html, caption in figures
    )
    return f'<div style="display: flex; flex-wrap: wrap; gap: 8px">{shown}</div><small>{escape(about)}</small>'


def bundle(text: str, html: str, png: bytes | None) -> dict[str, str]:
    """A MIME bundle; a single PNG is also added as an image, for front ends without HTML."""
    found = {"text/plain": text, "text/html": html}
    return found if png is None else {**found, "image/png": base64.b64encode(png).decode()}
