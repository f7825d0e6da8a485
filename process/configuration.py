"""Read the configuration of a server from flags, the environment and a file.

Precedence, highest first: flag, environment (``SAFELIGHT_<OPTION>``), file, default.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ..protocol.config import Config
from ..protocol.errors import StartFailed
from ..protocol.option import GROUPS

ENVIRONMENT_PREFIX = "SAFELIGHT_"

_OF_CLIENTS = frozenset({"url"})
_MISSPELT = 0.8
"""From this similarity on, an unknown variable is a misspelt option; others may belong to other programs."""


class Option(msgspec.Struct, frozen=True):
    """One field of :class:`Config`, for flags, documentation and the environment."""

    name: str
    annotation: Any
    default: Any
    description: str
    group: str
    """Where ``--help`` shows it."""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.name.upper()


def options() -> list[Option]:
    """Every option, group by group."""
    found = []
    for field in msgspec.structs.fields(Config):
        base, meta = field.type.__origin__, field.type.__metadata__[0]
        found.append(Option(field.name, base, field.default, meta.description, meta.extra["group"]))
    return sorted(found, key=lambda option: GROUPS.index(option.group))


def load_config(
    flags: Mapping[str, Any], environment: Mapping[str, str] | None = None, file: Path | None = None
) -> Config:
    """Merge ``flags`` over ``environment`` over ``file`` (TOML).

    Raises ``StartFailed``, which names the option and its valid values.
    """
    known = {option.name for option in options()}
    values: dict[str, Any] = _read_file(file) if file else {}
    for key, text in (environment or {}).items():
        name = key.removeprefix(ENVIRONMENT_PREFIX).lower()
        if not key.startswith(ENVIRONMENT_PREFIX) or name in _OF_CLIENTS:
            continue
        if name in known:
            values[name] = text
        elif close := difflib.get_close_matches(name, known, n=1, cutoff=_MISSPELT):
            meant = ENVIRONMENT_PREFIX + close[0].upper()
            raise StartFailed(f"There is no option {key}; did you mean {meant}?")
    values.update(flags)
    try:
        config = msgspec.convert(values, Config, strict=False)
    except msgspec.ValidationError as error:
        raise StartFailed(f"A configuration value cannot be used: {error}.") from None
    for name, value in msgspec.structs.asdict(config).items():
        if isinstance(value, float) and math.isinf(value):  # neither timers nor JSON accept infinity
            raise StartFailed(f"{name} is {value}; it must be a finite number, such as 1e9.")
    return config


def _read_file(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except FileNotFoundError:
        raise StartFailed(f"The configuration file {file} does not exist.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StartFailed(f"The configuration file {file} cannot be read as TOML: {error}.") from None
