"""The description of an option: its group in the documentation, its sentence and its bounds."""

from __future__ import annotations

from functools import partial
from typing import Any

from msgspec import Meta

GROUPS = (
    "model",
    "HTTP",
    "replicas",
    "forwards",
    "queue",
    "weights",
    "adapters",
    "what one request may ask for",
    "log",
)
"""The groups of options, in the order in which ``--help`` and the documentation show them."""


def _option(group: str, description: str, **bounds: Any) -> Meta:
    assert group in GROUPS
    return Meta(description=description, extra={"group": group}, **bounds)


model = partial(_option, "model")
http = partial(_option, "HTTP")
replicas = partial(_option, "replicas")
forwards = partial(_option, "forwards")
queue = partial(_option, "queue")
weights = partial(_option, "weights")
adapters = partial(_option, "adapters")
asking = partial(_option, "what one request may ask for")
log = partial(_option, "log")
