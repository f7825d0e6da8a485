"""Look up names at their first use, so that a release without one breaks only its users."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any


class MissingInternal(ImportError):
    """The installed release of a library lacks a name. The message has the name, the library and both releases."""


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
            if found is None:  # the default of a base class, if the class no longer sets it
                raise AttributeError(attribute)
        except (ImportError, AttributeError) as error:
            installed = importlib.metadata.version(library)
            raise MissingInternal(
                f"{library} {installed} has no {path}.{attribute}, which Safelight uses; install {library} {checked}"
            ) from error
        return found

    return functools.cache(find)  # every forward looks some of these up
