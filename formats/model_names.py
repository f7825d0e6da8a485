"""What the option ``model`` names: an embedded model, a directory, or a repository of the hub; embedded adapters."""

from __future__ import annotations

import re
from pathlib import Path

EMBEDDED = ("shapes", "shapes-video")
"""The names of the models that the package brings along: one draws pictures, one makes clips."""

EMBEDDED_ADAPTERS = ("outlined", "striped")
"""The names of the adapters that the package brings along for `shapes`: each makes it draw in a style."""

_ASSETS = Path(__file__).resolve().parent.parent / "assets"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_model(name: str) -> Path | str:
    """The directory that ``name`` means, whether it exists or not, or the hub id itself.

    A name that could be both is the directory when there is one.
    """
    if name in EMBEDDED:
        return _ASSETS / name
    path = Path(name).expanduser()
    if not path.exists() and _HUB_ID.fullmatch(name):
        return name
    return path


def embedded_adapter(name: str) -> Path:
    """The file of one of `EMBEDDED_ADAPTERS`. Raises ValueError for any other name."""
    if name not in EMBEDDED_ADAPTERS:
        raise ValueError(f"there is no embedded adapter {name!r}; expected one of {', '.join(EMBEDDED_ADAPTERS)}")
    return _ASSETS / "adapters" / f"{name}.safetensors"
