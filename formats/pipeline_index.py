"""``model_index.json``: the class and the components of a pipeline's directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..protocol.errors import StartFailed

INDEX = "model_index.json"


@dataclass(frozen=True, slots=True)
class PipelineIndex:
    """``class_name`` is ``None`` if the file does not name a class of diffusers; ``values`` has all entries.

    Only the class knows which entries are components: its other arguments may be lists of two strings too.
    """

    class_name: str | None
    values: Mapping[str, Any]


def read_index(directory: Path) -> PipelineIndex:
    """Read the index of the pipeline in ``directory``. Raises ``StartFailed`` if it is missing or unreadable."""
    if not (directory / INDEX).is_file():
        raise StartFailed(
            f"{directory} is not a diffusers pipeline, because it has no {INDEX}; "
            "give the directory that `save_pretrained` wrote."
        )
    values = read_object(directory / INDEX)
    name = values.get("_class_name")
    return PipelineIndex(name if isinstance(name, str) else None, values)


def read_object(file: Path) -> dict[str, Any]:
    """Read the JSON object in ``file``. Raises ``StartFailed``."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise StartFailed(f"{file} cannot be read as JSON; download or save the pipeline again.") from None
    if not isinstance(value, dict):
        raise StartFailed(f"{file} does not hold a JSON object; download or save the pipeline again.")
    return value
