"""A request's images, as its pipeline takes them, and the size of what is made from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image as pillow

from ..protocol.errors import InvalidRequest
from ..protocol.messages import Generate, Image
from .task import Task


def image_arguments(task: Task, request: Generate) -> dict[str, Any]:
    """The image under the pipeline's own name for it, with ``width`` and ``height`` where it takes them.

    What it makes is as large as the request says. Without that, pipelines that edit decide for themselves; a picture
    that is drawn over keeps its size, if it has no more pixels than the model is made for; and a clip has as many as
    the model is made for, in the image's proportions.
    """
    assert task.image_argument is not None, "only pipelines that take images are tried with some"
    pictures = [_picture(image) for image in request.images]
    if len(pictures) > 1 and not task.several_images:
        raise InvalidRequest(f"this model takes one image, not {len(pictures)}", field="image")
    size = _size(task, request)
    if size is not None and "width" not in task.arguments:
        pictures = [picture.resize(size, pillow.Resampling.LANCZOS) for picture in pictures]
    given: dict[str, Any] = {task.image_argument: pictures if len(pictures) > 1 else pictures[0]}
    return given if size is None or "width" not in task.arguments else given | {"width": size[0], "height": size[1]}


def _picture(image: Image) -> pillow.Image:
    return pillow.frombytes("RGB", (image.width, image.height), bytes(image.rgb))


def _size(task: Task, request: Generate) -> tuple[int, int] | None:
    """Width and height of what is to be made; ``None`` leaves them to the pipeline."""
    sizes = task.sizes
    if request.width is not None and request.height is not None:
        return request.width, request.height
    if "width" not in task.arguments and task.kind == "video":
        return None
    if "strength" not in task.arguments and task.kind == "image":
        return None
    image = request.images[0]
    limit = sizes.width * sizes.height if sizes.width and sizes.height else None
    width, height = fitting((image.width, image.height), sizes.multiple, limit, enlarge=task.kind == "video")
    return request.width or width, request.height or height


def fitting(size: Sequence[int], multiple: int, limit: int | None, *, enlarge: bool) -> tuple[int, int]:
    """``size`` in multiples of ``multiple``, with about ``limit`` pixels; smaller ones stay unless ``enlarge``."""
    scale = math.sqrt(limit / (size[0] * size[1])) if limit else 1.0
    scale = scale if enlarge else min(1.0, scale)
    width, height = (max(multiple, round(side * scale / multiple) * multiple) for side in size)
    return width, height
