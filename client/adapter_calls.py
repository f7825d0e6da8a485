"""Requests about LoRA adapters, like those of :mod:`.calls`."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from typing import Any

from ..protocol.adapters import ALL, WantedMode
from .calls import Call

LIST = Call("GET", "/v1/list_loras")

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
) -> Call:
    several = not isinstance(nickname, str)
    if path is None or isinstance(path, str | PathLike):
        paths: Any = None if path is None else fspath(path)
    else:
        paths = [None if one is None else fspath(one) for one in path]
    fields = {
        "lora_nickname": list(nickname) if several else nickname,
        "lora_path": paths,
        "strength": list(strength) if isinstance(strength, Sequence) else strength,
        "target": target if isinstance(target, str) else list(target),
        "merge_mode": mode,
        "strict": strict,
        "lora_alpha": list(alpha) if isinstance(alpha, Sequence) else alpha,
    }
    return Call("POST", "/v1/set_lora", {name: value for name, value in fields.items() if value is not None})


def merge_lora(strength: float | Sequence[float] | None = None, *, target: str = ALL) -> Call:
    strengths = list(strength) if isinstance(strength, Sequence) else strength
    return Call("POST", "/v1/merge_lora_weights", {"target": target, "strength": strengths})


def unmerge_lora(*, target: str = ALL) -> Call:
    return Call("POST", "/v1/unmerge_lora_weights", {"target": target})


def unload_lora(nickname: str) -> Call:
    return Call("POST", "/v1/unload_lora", {"lora_nickname": nickname})
