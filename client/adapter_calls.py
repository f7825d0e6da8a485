"""Requests about LoRA adapters, like those of :mod:`.calls`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from os import PathLike, fspath
from typing import Any

from ..protocol.adapters import ALL, WantedMode
from .calls import Call, given
from .errors import decode
from .results import Loras

_LORAS = partial(decode, Loras)

AdapterPath = str | PathLike[str]


def set_lora(
    nickname: str | Sequence[str],
    path: AdapterPath | Sequence[AdapterPath | None] | None = None,
    *,
    strength: float | Sequence[float] = 1.0,
    target: str | Sequence[str] = ALL,
    mode: WantedMode = "auto",
    alpha: float | Sequence[float | None] | None = None,
    strict: bool = True,
) -> Call[Loras]:
    """Load adapters from files or directories that the server may read, and activate them for all requests.

    ``mode``: ``merge`` adds them to the weights, ``dynamic`` applies them in the forward, ``auto`` merges unless
    rounding would lose part of the change, and ``request`` applies them only to requests that name them
    (``generate(lora=[{"name": nickname, "scale": 0.8}])``).
    """
    if path is None or isinstance(path, str | PathLike):
        paths: Any = None if path is None else fspath(path)
    else:
        paths = [None if one is None else fspath(one) for one in path]
    fields = {
        "lora_nickname": nickname,
        "lora_path": paths,
        "strength": strength,
        "target": target,
        "merge_mode": mode,
        "strict": strict,
        "lora_alpha": alpha,
    }
    return Call("POST", "/v1/set_lora", _LORAS, given(fields))


def merge_lora(strength: float | Sequence[float] | None = None, *, target: str = ALL) -> Call[Loras]:
    """Merge the active adapters into the weights, with new strengths if given."""
    return Call("POST", "/v1/merge_lora_weights", _LORAS, given({"target": target, "strength": strength}))


def unmerge_lora(*, target: str = ALL) -> Call[Loras]:
    """Unmerge the adapters; every byte of the weights is restored."""
    return Call("POST", "/v1/unmerge_lora_weights", _LORAS, {"target": target})


def unload_lora(nickname: str) -> Call[Loras]:
    """Unload an adapter."""
    return Call("POST", "/v1/unload_lora", _LORAS, {"lora_nickname": nickname})


def loras() -> Call[Loras]:
    """List the loaded and the active adapters."""
    return Call("GET", "/v1/list_loras", _LORAS)
