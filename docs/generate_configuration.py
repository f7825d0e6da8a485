"""Write ``docs/configuration.md`` from the options in the code: ``python docs/generate_configuration.py``."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any, Literal

import msgspec

from safelight.process.configuration import Option, options
from safelight.protocol.config import Config

PAGE = Path(__file__).with_name("configuration.md")

HEAD = """\
# Configuration

<!-- Made by `python docs/generate_configuration.py`; what is written here by hand is lost. -->

Every option of `safelight serve` (the same as `python -m safelight.server`) can be given in three ways. What stands
higher wins:

1. a **flag**: `safelight serve --max-batch 8`. The model may also come first, without a flag:
   `safelight serve path/to/pipeline`;
2. an **environment variable**: `SAFELIGHT_MAX_BATCH=8`;
3. a **TOML file** that `--config` names, in which the options are top-level keys:

```toml
model = "path/to/pipeline"
port = 8000
max_batch = 8
grace_s = 10.0
log_format = "json"
```

A flag or a key that does not exist, or a value that an option cannot have, ends the start with one sentence that names
it. `GET /server_info` shows what a running server was given, except for its API key.

| Flag | Variable | Key | Value | Default | |
|---|---|---|---|---|---|
"""


def document() -> str:
    """The page's text."""
    limits = {field.name: field.type.__metadata__[0] for field in msgspec.structs.fields(Config)}
    return HEAD + "".join(row(option, limits[option.name]) for option in options())


def row(option: Option, limits: msgspec.Meta) -> str:
    default = "none" if option.default is None else f"`{option.default}`"
    cells = (
        f"`{option.flag}`",
        f"`{option.variable}`",
        f"`{option.name}`",
        values(option.annotation, limits),
        default,
        option.description,
    )
    return f"| {' | '.join(cells)} |\n"


def values(annotation: Any, limits: msgspec.Meta) -> str:  # Any: a type, a literal or a union of types
    """The allowed values of an option, in words."""
    if typing.get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(annotation))
    members = [kind for kind in typing.get_args(annotation) or (annotation,) if kind is not types.NoneType]
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    return " or ".join(names[kind] for kind in members) + bounds(limits)


def bounds(limits: msgspec.Meta) -> str:
    if limits.ge is not None and limits.le is not None:
        return f", {limits.ge} to {limits.le}"
    if limits.ge is not None:
        return f", at least {limits.ge}"
    return "" if limits.gt is None else f", more than {limits.gt}"


if __name__ == "__main__":
    PAGE.write_text(document(), encoding="utf-8")
