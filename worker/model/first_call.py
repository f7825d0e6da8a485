"""A pipeline's local variables at its first call of a component, for a request that gives only what is required.

By then the pipeline has filled in its own defaults and refused what it cannot take.
"""

from __future__ import annotations

import inspect
import logging
import sys
from types import CodeType, FrameType
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image as pillow

from ..crossing.call import Call
from ..crossing.fork import Fork
from ..pipelines.image_variants import as_taken

log = logging.getLogger(__name__)


class _Begun(BaseException):
    """Raised at the pipeline's first call of a component, with its local variables."""

    def __init__(self, variables: dict[str, Any]) -> None:
        super().__init__()
        self.variables = variables


def variables_at_first_call(
    pipeline: DiffusionPipeline, pictures_as: tuple[str, ...], **arguments: Any
) -> dict[str, Any] | None:
    """The local variables of the pipeline's ``__call__`` at its first call of a component, which is not made.

    The pipeline gets a prompt, a picture as each of ``pictures_as``, and ``arguments``. ``None`` if it refuses them.
    """
    function = type(pipeline).__call__
    takes = inspect.signature(function).parameters
    given: dict[str, Any] = {"prompt": "a star"} if "prompt" in takes else {}
    given |= {name: as_taken(name, pillow.new("RGB", (64, 64))) for name in pictures_as}
    code = inspect.unwrap(function).__code__

    def stop(_: Call) -> Any:
        raise _Begun(_variables(sys._getframe(), code))

    try:
        with Fork(pipeline, stop) as forked:
            forked(**given, **arguments)
        return {}
    except _Begun as begun:
        return begun.variables
    except Exception as error:  # noqa: BLE001  # pipelines refuse arguments with any exception
        log.debug("%s does not begin with %s: %r", type(pipeline).__name__, arguments, error)
        return None


def _variables(frame: FrameType | None, code: CodeType) -> dict[str, Any]:
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return {} if frame is None else dict(frame.f_locals)
