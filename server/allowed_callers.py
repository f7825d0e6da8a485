"""The hosts and the origins that the configuration allows."""

from __future__ import annotations

import re

from ..protocol.config import Config
from ..protocol.errors import StartFailed

_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^\s:\[\]/@]+)(:[0-9]{1,5})?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\s:\[\]/@*,]+)(:[0-9]{1,5})?")


def allowed_hosts(config: Config) -> frozenset[str]:
    """Raises ``StartFailed`` for an entry that is not a host."""
    return frozenset({config.host.lower(), *(_host_of(entry) for entry in _entries(config.allowed_hosts))})


def allowed_origins(config: Config) -> frozenset[str]:
    """Raises ``StartFailed`` for an entry that is not an origin."""
    return frozenset(_origin_of(entry) for entry in _entries(config.cors_origins))


def host_name(text: str) -> str | None:
    """The name or address in ``text`` without its port; ``None`` for other text."""
    found = _HOST.fullmatch(text.lower())
    return None if found is None else found["name"].strip("[]").rstrip(".")


def _entries(text: str) -> list[str]:
    return [entry.strip() for entry in text.split(",") if entry.strip()]


def _host_of(entry: str) -> str:
    name = host_name(entry)
    if name is None:
        raise StartFailed(f"--allowed-hosts takes names and addresses such as gpu.example.com, not {entry!r}.")
    return name


def _origin_of(entry: str) -> str:
    origin = entry.lower().rstrip("/")
    if not _ORIGIN.fullmatch(origin):
        raise StartFailed(
            f"--cors-origins takes origins such as https://app.example.com, each by itself, not {entry!r}."
        )
    return origin
