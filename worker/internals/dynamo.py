"""Undocumented names of torch's compiler that workers use; looked up late, because its import takes a second."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

from .lookup import lookup

CHECKED = "2.13.0"

NAMES = {
    "run": "torch._dynamo:run",
    "maybe_mark_dynamic": "torch._dynamo:maybe_mark_dynamic",
    "inductor_config": "torch._inductor:config",
    "lookup_backend": "torch._dynamo:lookup_backend",
    "default_cache_dir": "torch._inductor.runtime.cache_dir_utils:default_cache_dir",
}

SETTINGS_CHANGED = "state changed while dynamo tracing"
"""Part of the message of the ``AssertionError`` of dynamo if torch's settings changed while it made a graph."""

_RESTORED_BY = (
    (torch.random, "set_rng_state"),
    (torch.cuda, "set_rng_state"),
    (torch, "set_default_dtype"),
    (torch, "use_deterministic_algorithms"),
    (torch._C, "_set_fp32_precision_setter"),
)
"""Functions that dynamo calls to set back the state of the whole process, once a graph is made."""
__getattr__ = lookup("torch", CHECKED, NAMES)


def restore_nothing() -> None:
    """In the calling thread, have the compiler leave the state of the whole process as it is.

    When a graph is made, it would set the random state and torch's settings back to what they were when it began. In
    the meantime requests that run in other threads have changed them."""
    for module, name in _RESTORED_BY:
        setter = getattr(module, name)
        if not isinstance(setter, _Setter):
            setter = _Setter(setter)
            setattr(module, name, setter)
        setter.mute()


class _Setter:
    """A function of torch that does nothing in the threads that muted it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._threads = threading.local()

    def mute(self) -> None:
        self._threads.muted = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if "muted" in vars(self._threads) else self._function(*args, **kwargs)
