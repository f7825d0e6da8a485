"""Overlays: classes put before a module's own, with which the runtime takes part in the module's forward."""

from __future__ import annotations

from typing import ClassVar

from torch import nn


class Overlay(nn.Module):
    """Stands before a module's class and calls that class's forward. Pipelines see the module's own class."""

    overlay_attribute: ClassVar[str]
    """The one attribute that a module has with the overlay and not without."""


def base_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without an overlay."""
    cls = type(module)
    base: type[nn.Module] = cls.__bases__[1] if issubclass(cls, Overlay) else cls
    return base


def overlay_attributes(module: nn.Module) -> frozenset[str]:
    """The names of the attributes that the module has by its overlays."""
    overlays = (cls for cls in type(module).__mro__ if issubclass(cls, Overlay))
    return frozenset(vars(cls)["overlay_attribute"] for cls in overlays if "overlay_attribute" in vars(cls))
