"""``type(module)`` in a pipeline's code sees through boundaries.

A boundary answers ``isinstance`` and ``__class__`` as its module would, but no object can override ``type``: a pipeline
that tests ``type(layer) is Layer`` would find no such layer. So the Python modules that define a pipeline get a global
``type`` that looks through boundaries and shadows the builtin. Other code is not affected.
"""

from __future__ import annotations

import sys
from typing import Any

from diffusers import DiffusionPipeline

from .boundary import Boundary


class _LikeType(type):
    """Makes :class:`TypeThroughBoundaries` behave as the builtin in every other use."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and type(args[0]) is Boundary:
            return args[0].__class__
        return type(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, type)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, type)


class TypeThroughBoundaries(type, metaclass=_LikeType):
    """``type``, except that it returns the module's class for a boundary."""

    def __class_getitem__(cls, item: Any) -> Any:
        return type[item]


def look_through_boundaries(pipeline: type[DiffusionPipeline]) -> None:
    """Let ``type`` look through boundaries in the Python modules that define ``pipeline``, its bases and its mixins."""
    for cls in pipeline.__mro__:
        if cls not in DiffusionPipeline.__mro__ and cls.__module__.partition(".")[0] not in sys.stdlib_module_names:
            vars(sys.modules[cls.__module__]).setdefault("type", TypeThroughBoundaries)
