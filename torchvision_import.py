"""Imports torchvision without its compiled operators if these cannot be loaded.

PyPI has only torchvision's CUDA build. With torch's CPU build its operators do not load, and the import of torchvision
fails when it registers them with torch. Without torchvision, transformers' image processors and their pipelines fail
too. The Python part works alone, and no pipeline calls the operators (such as non-maximum suppression).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRATIONS = "torchvision._meta_registrations"
_EXTENSION = "torchvision.extension"  # imported earlier; knows whether the operators were loaded

log = logging.getLogger(__name__)


class _WithoutOperators(MetaPathFinder, Loader):
    """Replaces the module that registers the operators by an empty one if they are missing."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        extension = sys.modules.get(_EXTENSION) if fullname == _REGISTRATIONS else None
        return None if extension is None or extension._has_ops() else ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        log.warning(
            "the compiled operators of torchvision cannot be loaded, because its build is for another torch; "
            "torchvision is used without them"
        )


def allow_without_operators() -> None:
    """Let later imports of torchvision succeed without its compiled operators, with a warning in the log."""
    if not any(isinstance(finder, _WithoutOperators) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WithoutOperators())
