"""The cost of a request: refuses one whose longest forward would delay all others for too long."""

from __future__ import annotations

from ..protocol.config import Config
from ..protocol.costs import longest, most_pixels, output_pixels
from ..protocol.errors import InvalidRequest
from ..protocol.generation import Generate
from ..protocol.replicas import ModelInfo
from .replicas import Replica, Replicas


def refusal_of(generate: Generate, replicas: Replicas, config: Config) -> InvalidRequest | None:
    """Why the request cannot be served: by what was measured, its longest forward takes over ``--max-forward-s``.

    The model's default size is never refused: the server is there for it.
    """
    refusals = [
        _refusal_of(generate, replica, config.max_forward_s) for replica in replicas if replica.state == "ready"
    ]
    return refusals[0] if refusals and all(refusals) else None


def _refusal_of(generate: Generate, replica: Replica, limit_s: float) -> InvalidRequest | None:
    assert replica.model is not None, "it is ready"
    pixels, usual = pixels_of(generate, replica.model), default_pixels(replica.model)
    costs = replica.stats.costs
    name, seconds = longest(costs, pixels)
    if pixels <= usual or seconds <= limit_s:
        return None
    return InvalidRequest(
        f"One call to {name} for {pixels} pixels would take up to {seconds:.3g} s, by what was measured at smaller "
        f"sizes, and hold up every other request; --max-forward-s allows {limit_s:g} s. Ask for at most "
        f"{max(usual, most_pixels(costs, limit_s))} pixels (width x height x frames).",
        field="width" if generate.width is not None else "height" if generate.height is not None else "num_frames",
    )


def pixels_of(generate: Generate, model: ModelInfo) -> int:
    """The pixels of one output. Where one side is given, the other follows from the model or the image."""
    if generate.images and (generate.width is None) != (generate.height is None):
        image = generate.images[0]
        side = (generate.width or generate.height or 0) / (image.width if generate.width else image.height)
        return int(image.width * image.height * side * side)
    width, height = generate.width or model.default_width, generate.height or model.default_height
    frames = generate.num_frames or model.default_num_frames
    return output_pixels(width, height, frames, default=default_pixels(model))


def default_pixels(model: ModelInfo) -> int:
    return output_pixels(model.default_width, model.default_height, model.default_num_frames, default=0)
