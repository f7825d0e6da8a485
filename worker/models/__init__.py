"""What is known of model classes beyond what diffusers and transformers say: how to divide and to fuse them.

A family file makes its models faster and larger; none is needed to serve them. Every module here that has ``FAMILIES``
is one.
"""

from __future__ import annotations

import functools
import importlib
import logging
import pkgutil
from collections.abc import Mapping

from torch import nn

from ..parallel.plan import Family

log = logging.getLogger(__name__)


def family_of(cls: type[nn.Module]) -> Family | None:
    """The family of a model class, or ``None`` where there is none."""
    return families().get(cls.__name__)


@functools.cache
def families() -> Mapping[str, Family]:
    """By class name. A family whose library has changed is left out: its models are then served whole."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        try:
            found |= getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILIES", {})
        except ImportError as error:
            log.warning("the tensor-parallel plan of %s cannot be used: %s", module.name, error)
    return found
