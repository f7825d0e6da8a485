"""What is known of model classes beyond what diffusers and transformers say: how to divide and to fuse them.

A family file makes its models faster and larger; none is needed to serve them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

from ..parallel.plan import Family
from . import flux, flux2, hunyuan_video, ltx, qwen_image, sd3, text_encoders, wan, z_image

_MODULES = (flux, flux2, sd3, qwen_image, z_image, wan, hunyuan_video, ltx, text_encoders)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {name: family for module in _MODULES for name, family in module.FAMILIES.items()}
)
"""By class name."""


def family_of(cls: type[nn.Module]) -> Family | None:
    """The family of a model class, or ``None`` where there is none."""
    return FAMILIES.get(cls.__name__)
