"""What the option ``model`` names: an embedded model, a directory, or a repository of the hub."""

from __future__ import annotations

import re
from pathlib import Path

EMBEDDED = ("shapes", "shapes-video")
"""The names of the models that the package brings along: one draws pictures, one makes clips."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_model(name: str) -> Path | str:
    """The directory that ``name`` means, whether it exists or not, or the hub id itself.

    A name that could be both is the directory when there is one.
    """
    if name in EMBEDDED:
        return Path(__file__).resolve().parent.parent / "assets" / name
    path = Path(name).expanduser()
    if not path.exists() and _HUB_ID.fullmatch(name):
        return name
    return path
