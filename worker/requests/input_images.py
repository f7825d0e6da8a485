"""A request's images as arguments of its pipeline, and the size of the output."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image as pillow

from ...protocol.errors import InvalidRequest
from ...protocol.generation import Generate, Image
from ..model.pipeline_task import PipelineTask
from ..pipelines.image_variants import as_taken


def image_arguments(task: PipelineTask, request: Generate) -> dict[str, Any]:
    """The images under the pipeline's argument names, with ``width`` and ``height`` if it takes them.

    The output has the size that the request gives; if it gives one side, the other follows in proportion. Without a
    given size, editing pipelines choose the size themselves; a picture that is redrawn keeps its size, up to the number
    of pixels for which the model was trained; a clip has that number, in the image's proportions.

    Raises ``InvalidRequest`` for a wrong number of images and for an output that is too large.
    """
    assert task.image_arguments, "only pipelines that take images receive some"
    pictures = [_picture(image) for image in request.images]
    needed = len(task.image_arguments)
    if len(pictures) != needed and not (needed == 1 and task.several_images):
        names = ", ".join(task.image_arguments)
        raise InvalidRequest(f"this model takes {needed} images ({names}), not {len(pictures)}", field="image")
    size = _size(task, request)
    takes_sides = "width" in task.arguments
    if size is not None and not takes_sides:
        pictures = [picture.resize(size, pillow.Resampling.LANCZOS) for picture in pictures]
    given: dict[str, Any] = dict(zip(task.image_arguments, pictures, strict=False))
    if len(pictures) > needed:
        given = {task.image_arguments[0]: pictures}
    given = {name: as_taken(name, value) for name, value in given.items()}
    return given if size is None or not takes_sides else given | {"width": size[0], "height": size[1]}


def _picture(image: Image) -> pillow.Image:
    return pillow.fromarray(np.asarray(image.rgb.data).reshape(image.height, image.width, 3))


def _size(task: PipelineTask, request: Generate) -> tuple[int, int] | None:
    """Width and height of the output; ``None`` if the pipeline chooses them."""
    given = (request.width, request.height)
    if given == (None, None) and "strength" not in task.arguments and (task.kind == "image" or not task.sizes.width):
        return None
    image, sizes = request.images[0], task.sizes
    limit = sizes.width * sizes.height if sizes.width and sizes.height else None
    size = fitting((image.width, image.height), given, sizes.multiple, limit, enlarge=task.kind == "video")
    if size[0] * size[1] > task.max_pixels:
        raise InvalidRequest(
            f"In the image's proportions the output would have {size[0]} x {size[1]} pixels, and up to "
            f"{task.max_pixels} are allowed; give width and height.",
            field="image",
        )
    return size


def fitting(
    image: tuple[int, int], given: tuple[int | None, int | None], multiple: int, limit: int | None, *, enlarge: bool
) -> tuple[int, int]:
    """Width and height in multiples of ``multiple`` and in the proportions of ``image``, except for ``given`` sides.

    If none is given, they have about ``limit`` pixels; smaller images keep their size unless ``enlarge``.
    """
    if given[0] is not None:
        scale = given[0] / image[0]
    elif given[1] is not None:
        scale = given[1] / image[1]
    else:
        scale = math.sqrt(limit / (image[0] * image[1])) if limit else 1.0
        scale = scale if enlarge else min(1.0, scale)
    sides = (max(multiple, round(side * scale / multiple) * multiple) for side in image)
    width, height = (own or side for own, side in zip(given, sides, strict=True))
    return width, height
