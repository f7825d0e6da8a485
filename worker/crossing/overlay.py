"""Overlays: classes put before a module's own, with which the runtime takes part in the module's forward."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from torch import nn

_OF_MODULES = frozenset(vars(nn.Module()))
"""Parameters, buffers, sub-modules and hooks."""


class Overlay(nn.Module):
    """Stands before a module's class and calls that class's forward. Pipelines see the module's own class."""

    overlay_attribute: ClassVar[str]
    """The one attribute that a module has with the overlay and not without."""


def put_overlay(overlay: type[Overlay], module: nn.Module, value: object) -> None:
    """Put ``overlay`` before the class of ``module``; ``value`` becomes the overlay's attribute."""
    vars(module)[overlay.overlay_attribute] = value
    module.__class__ = _overlaid(overlay, type(module))  # type: ignore[arg-type]  # a class is hashable


@functools.cache
def _overlaid(overlay: type[Overlay], base: type[nn.Module]) -> type[nn.Module]:
    """Keeps the name of ``base`` and the parameters of its forward, because libraries look at both."""
    overlaid: type[nn.Module] = type(base.__name__, (overlay, base), {"__module__": overlay.__module__})
    own_forward = overlaid.forward

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own_forward(self, *args, **kwargs)

    overlaid.forward = forward
    return overlaid


def base_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without overlays."""
    cls = type(module)
    while issubclass(cls, Overlay):
        cls = cls.__bases__[1]
    return cls


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes that the module's own code has set: none of :class:`nn.Module`'s, and none of overlays."""
    others = _OF_MODULES | overlay_attributes(module)
    return {name: value for name, value in vars(module).items() if name not in others}


def overlay_attributes(module: nn.Module) -> frozenset[str]:
    """The names of the attributes that the module has by its overlays."""
    overlays = (cls for cls in type(module).__mro__ if issubclass(cls, Overlay))
    return frozenset(vars(cls)["overlay_attribute"] for cls in overlays if "overlay_attribute" in vars(cls))
