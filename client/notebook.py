"""HTML of outputs in a notebook: a picture as ``<img>``, a clip as ``<video>``, a tensor as text."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from ..protocol.output_formats import FORMATS

if TYPE_CHECKING:
    from .results import Generation, Output

SMALL = 256
"""Narrower pictures are enlarged to this width in pixels, without smoothing."""


def element(output: Output) -> str:
    """The HTML element of ``output``, with the bytes inline."""
    kind = FORMATS[output.format]
    if kind.holds is None:
        return f"<code>{escape(repr(output))}</code>"
    width = max(output.width, SMALL)
    style = "image-rendering: pixelated" if output.width < SMALL else ""
    data = base64.b64encode(output.data).decode()
    if kind.holds == "video":
        look = f'width="{width}" style="{style}" controls loop autoplay muted playsinline'
        return f'<video src="data:{kind.media_type};base64,{data}" {look}></video>'
    return f'<img src="data:{kind.media_type};base64,{data}" width="{width}" style="{style}" alt="{output!r}">'


def gallery(generation: Generation) -> str:
    """All outputs side by side, captioned with their seeds, and a line about the request."""
    figures = "".join(
        f'<figure style="margin: 0">{element(output)}<figcaption>seed {output.seed}</figcaption></figure>'
        for output in generation.outputs
    )
    about = (
        f"{escape(generation.model)}, weights {escape(generation.weight_version)}, {generation.steps} steps, "
        f"{generation.timings.total_s:.2f} s"
    )
    return f'<div style="display: flex; flex-wrap: wrap; gap: 8px">{figures}</div><small>{about}</small>'


def bundle(text: str, html: str, outputs: Sequence[Output]) -> dict[str, str]:
    """A MIME bundle; a single PNG is also added as an image, for front ends without HTML."""
    found = {"text/plain": text, "text/html": html}
    if len(outputs) == 1 and outputs[0].format == "png":
        found["image/png"] = base64.b64encode(outputs[0].data).decode()
    return found
