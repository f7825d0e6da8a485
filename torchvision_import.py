"""Lets torchvision be imported where its compiled operators cannot be loaded, without them.

PyPI has torchvision's build for CUDA alone. Beside a torch for CPUs its operators do not load, and torchvision fails
while it describes them to torch; with it fail all of transformers' image processors, and the pipelines that have one.
The Python part is whole, and no pipeline calls the operators (such as non-maximum suppression).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_DESCRIPTIONS = "torchvision._meta_registrations"
_EXTENSION = "torchvision.extension"  # imported before it, and knows whether the operators were loaded

log = logging.getLogger(__name__)


class _WithoutOperators(MetaPathFinder, Loader):
    """Puts an empty module in the place of what describes operators that are not there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        extension = sys.modules.get(_EXTENSION) if fullname == _DESCRIPTIONS else None
        return None if extension is None or extension._has_ops() else ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        log.warning(
            "the compiled operators of torchvision cannot be loaded, as its build is for another torch; "
            "its Python part is used without them"
        )


def allow_without_operators() -> None:
    """From now on, a torchvision whose operators cannot be loaded is imported without them, and the log says so."""
    if not any(isinstance(finder, _WithoutOperators) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WithoutOperators())
