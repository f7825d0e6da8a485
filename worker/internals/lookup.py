"""Names that are looked up when they are first used, so that a release without one breaks only what needs it."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any


class MissingInternal(ImportError):
    """A library has changed; the message names the library, the releases and the name."""


def lookup(library: str, checked: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module with ``names``, each as ``module:attribute`` or ``module:Class.attribute``."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(name)
        path, _, attribute = names[name].partition(":")
        try:
            found: Any = importlib.import_module(path)
            for part in attribute.split("."):
                found = getattr(found, part)
            if found is None:  # what a base class says, for a class that no longer says it
                raise AttributeError(attribute)
        except (ImportError, AttributeError) as error:
            installed = importlib.metadata.version(library)
            raise MissingInternal(
                f"{library} {installed} has no {path}.{attribute}, which Safelight uses of {library} {checked}"
            ) from error
        return found

    return functools.cache(find)  # settings of every forward are among them
