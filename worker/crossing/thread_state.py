"""torch's settings that a pipeline can change around a call: autocast, inference and gradient mode, defaults, modes.

They belong to the thread or the process, and all coroutines run in one thread. So each coroutine's settings are put
away while it waits, and its calls are made with them. diffusers' choice of an attention kernel is one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _device
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack,
)
from torch.utils._python_dispatch import (
    _pop_mode as _pop_dispatch_mode,
)
from torch.utils._python_dispatch import (
    _push_mode as _push_dispatch_mode,
)

ThreadState = tuple[Any, ...]
"""A value for each of the settings; two that are equal are the same for any computation."""

_AUTOCAST_DEVICES = ("cpu", "cuda")


def _autocast() -> tuple[tuple[str, bool, torch.dtype], ...]:
    if not torch._C._is_any_autocast_enabled():
        return ()
    return tuple(
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _AUTOCAST_DEVICES
    )


def _set_autocast(found: tuple[tuple[str, bool, torch.dtype], ...]) -> None:
    torch.clear_autocast_cache()  # its casts are of weights, which may change while a coroutine waits
    for device, enabled, dtype in found or [(device, False, None) for device in _AUTOCAST_DEVICES]:
        torch.set_autocast_enabled(device, enabled)
        if dtype is not None:
            torch.set_autocast_dtype(device, dtype)


def _modes() -> tuple[Any, ...]:
    """The function modes, and the default device, which is one of them."""
    if not torch._C._len_torch_function_stack():
        return ()
    context = vars(torch._GLOBAL_DEVICE_CONTEXT).get("device_context")
    return (_device.CURRENT_DEVICE, context, *_get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def _set_modes(found: tuple[Any, ...]) -> None:
    for _ in range(torch._C._len_torch_function_stack()):
        _pop_mode()  # type: ignore[no-untyped-call]
    _device.CURRENT_DEVICE, torch._GLOBAL_DEVICE_CONTEXT.device_context, *modes = found or (None, None)
    for mode in modes:
        _push_mode(mode)  # type: ignore[no-untyped-call]


def _dispatch_modes() -> tuple[Any, ...]:
    return tuple(_get_current_dispatch_mode_stack()) if torch._C._len_torch_dispatch_stack() else ()


def _set_dispatch_modes(found: tuple[Any, ...]) -> None:
    for _ in range(torch._C._len_torch_dispatch_stack()):
        _pop_dispatch_mode()
    for mode in found:
        _push_dispatch_mode(mode)


def _attention_backend() -> Any:
    return _AttentionBackendRegistry._active_backend


def _attention_order() -> tuple[int, ...]:
    return tuple(torch._C._get_sdp_priority_order())


def _deterministic() -> tuple[bool, bool]:
    return torch._C._get_deterministic_algorithms(), torch._C._get_deterministic_algorithms_warn_only()


def _set_deterministic(found: tuple[bool, bool]) -> None:
    torch._C._set_deterministic_algorithms(found[0], warn_only=found[1])


_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.is_grad_enabled, torch._C._set_grad_enabled),
    (_autocast, _set_autocast),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    (_modes, _set_modes),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (_deterministic, _set_deterministic),
    (torch.get_num_threads, torch.set_num_threads),
    (_attention_backend, _AttentionBackendRegistry.set_active_backend),
    (_dispatch_modes, _set_dispatch_modes),
    (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    (torch._C._get_cudnn_benchmark, torch._C._set_cudnn_benchmark),
    (torch._C._get_cudnn_deterministic, torch._C._set_cudnn_deterministic),
    (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    (_attention_order, lambda found: torch._C._set_sdp_priority_order(list(found))),
    (torch._C._get_flash_sdp_enabled, torch._C._set_sdp_use_flash),
    (torch._C._get_mem_efficient_sdp_enabled, torch._C._set_sdp_use_mem_efficient),
    (torch._C._get_math_sdp_enabled, torch._C._set_sdp_use_math),
    (torch._C._get_cudnn_sdp_enabled, torch._C._set_sdp_use_cudnn),
)


def thread_state() -> ThreadState:
    """The settings as they are now."""
    return (torch.is_inference_mode_enabled(), *[read() for read, _ in _SETTINGS])


class Swap:
    """Puts the settings ``new`` in the place of the present ones, ``old``, until :meth:`back`."""

    def __init__(self, old: ThreadState, new: ThreadState) -> None:
        self._old = old
        self._inference = None
        if old[0] != new[0]:
            # the only way to set this one is to enter a context, and to leave it is to come back
            self._inference = torch._C._InferenceMode(new[0])
            self._inference.__enter__()  # type: ignore[no-untyped-call]
            old = thread_state()  # which it changes
        _set(old, new)

    def back(self) -> None:
        if self._inference is not None:
            self._inference.__exit__(None, None, None)
        _set(thread_state(), self._old)


def _set(old: ThreadState, new: ThreadState) -> None:
    for (_, write), before, after in zip(_SETTINGS, old[1:], new[1:], strict=True):
        if before != after:
            write(after)


@contextmanager
def within(state: ThreadState) -> Iterator[None]:
    """Around what is computed with the settings ``state``."""
    swap = Swap(thread_state(), state)
    try:
        yield
    finally:
        swap.back()
