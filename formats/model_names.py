"""Names of models: an embedded model, a directory or a hub repository; names of embedded adapters."""

from __future__ import annotations

import re
from pathlib import Path

EMBEDDED = ("shapes", "shapes-video")
"""The models in the package: one for pictures, one for clips."""

EMBEDDED_ADAPTERS = ("outlined", "striped")
"""The adapters in the package, each a drawing style of `shapes`."""

_ASSETS = Path(__file__).resolve().parent.parent / "assets"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_model(name: str) -> Path | str:
    """The path of ``name``, whether it exists or not, or the hub id.

    A name that could be both is the path if that exists.
    """
    if name in EMBEDDED:
        return _ASSETS / name
    path = Path(name).expanduser()
    if not path.exists() and _HUB_ID.fullmatch(name):
        return name
    return path


def embedded_adapter(name: str) -> Path:
    """The file of an embedded adapter. Raises ``ValueError`` for other names."""
    if name not in EMBEDDED_ADAPTERS:
        raise ValueError(f"there is no embedded adapter {name!r}; expected one of {', '.join(EMBEDDED_ADAPTERS)}")
    return _ASSETS / "adapters" / f"{name}.safetensors"
