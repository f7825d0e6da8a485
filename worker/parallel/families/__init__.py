"""Model families: tensor-parallel plans and fusable projections that diffusers and transformers do not declare.

A family file lets its models run faster or on more ranks; a model without one is served too. Every module here that has
``FAMILIES`` is a family file.
"""

from __future__ import annotations

import functools
import importlib
import logging
import pkgutil
from collections.abc import Mapping

from torch import nn

from ...internals.lookup import MissingInternal
from ..plan import Family

log = logging.getLogger(__name__)


def family_of(cls: type[nn.Module]) -> Family | None:
    """The family of a model class, or ``None``."""
    return families().get(cls.__name__)


@functools.cache
def families() -> Mapping[str, Family]:
    """Families by class name. One whose library has changed is omitted; its models are then served unsharded."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        try:
            found |= getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILIES", {})
        except MissingInternal as error:
            log.warning("the tensor-parallel plan of %s cannot be used: %s", module.name, error)
    return found
