"""``type(module)``, as the code of a pipeline asks it.

A boundary answers ``isinstance`` and ``__class__`` as its module would, but no object can choose what ``type`` says of
it: a pipeline that switches layers on where ``type(layer) is Layer`` would find none. So the Python modules that define
a pipeline get a global ``type`` that looks through boundaries, in place of the builtin. Other code does not see it.
"""

from __future__ import annotations

import sys
from typing import Any

from diffusers import DiffusionPipeline

from .boundary import Boundary


class _LikeType(type):
    """What makes :class:`TypeThroughBoundaries` the builtin in every other use of its name."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and type(args[0]) is Boundary:
            return args[0].__class__
        return type(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, type)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, type)


class TypeThroughBoundaries(type, metaclass=_LikeType):
    """``type``, which of a boundary says the class of the module behind it."""

    def __class_getitem__(cls, item: Any) -> Any:
        return type[item]


def look_through_boundaries(pipeline: type[DiffusionPipeline]) -> None:
    """Let ``type`` look through boundaries in the Python modules that define ``pipeline``, its bases and its mixins."""
    for cls in pipeline.__mro__:
        if cls not in DiffusionPipeline.__mro__ and cls.__module__.partition(".")[0] not in sys.stdlib_module_names:
            vars(sys.modules[cls.__module__]).setdefault("type", TypeThroughBoundaries)
