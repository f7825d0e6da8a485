"""What a pipeline makes of a request that leaves everything out, seen where it comes to its first component.

By then it has put its own values in the place of missing arguments, and has refused what it cannot take.
"""

from __future__ import annotations

import inspect
import logging
import sys
from types import CodeType, FrameType
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image as pillow

from .crossing.call import Call
from .crossing.fork import Fork
from .image_variants import as_taken

log = logging.getLogger(__name__)


class _Begun(BaseException):
    """A pipeline has come to its first call of a component, with these local variables."""

    def __init__(self, variables: dict[str, Any]) -> None:
        super().__init__()
        self.variables = variables


def variables_at_first_call(
    pipeline: DiffusionPipeline, pictures_as: tuple[str, ...], **arguments: Any
) -> dict[str, Any] | None:
    """The variables of the pipeline's ``__call__`` when it comes to its first component; no component is called.

    ``None`` where it refuses ``arguments``, which come beside a prompt, and a picture as each of ``pictures_as``.
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
    except Exception as error:  # noqa: BLE001  # pipelines refuse arguments by errors of any kind
        log.debug("%s does not begin with %s: %r", type(pipeline).__name__, arguments, error)
        return None


def _variables(frame: FrameType | None, code: CodeType) -> dict[str, Any]:
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return {} if frame is None else dict(frame.f_locals)
