"""Undocumented names of torch's compiler that workers use; looked up late, because its import takes a second."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import nullcontext
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

_SESSION = "_compile_session_context"
"""The context in which ``torch.compiler.is_compiling()`` is true, for all threads of the process."""

_TRACING = "is_fx_symbolic_tracing"
"""It says whether any thread traces outside of such a context; dynamo takes it when it wraps a function."""

__getattr__ = lookup("torch", CHECKED, NAMES)


def restore_nothing() -> None:
    """In the calling thread, have the compiler leave the state of the whole process as it is.

    When a graph is made, it would set the random state and torch's settings back to what they were when it began. In
    the meantime requests that run in other threads have changed them. Nor does the code of requests, which asks for
    that, see that something is compiled.
    """
    for module, name in _RESTORED_BY:
        _mute(module, name, lambda: None)
    if hasattr(torch.compiler, _SESSION):
        _mute(torch.compiler, _SESSION, nullcontext)
        # where the process traces without such a session, dynamo would refuse to run graphs, in any thread
        setattr(torch.fx._symbolic_trace, _TRACING, _never)


def _never() -> bool:
    return False


def _mute(module: Any, name: str, instead: Callable[[], Any]) -> None:
    setter = getattr(module, name)
    if not isinstance(setter, _Setter):
        setter = _Setter(setter, instead)
        setattr(module, name, setter)
    setter.mute()


class _Setter:
    """A function of torch; in the threads that muted it, it is ``instead``."""

    def __init__(self, function: Callable[..., Any], instead: Callable[[], Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._instead = instead
        self._threads = threading.local()

    def mute(self) -> None:
        self._threads.muted = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._instead() if "muted" in vars(self._threads) else self._function(*args, **kwargs)
