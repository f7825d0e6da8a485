"""torch's settings that a pipeline can change around a call: autocast, gradients, defaults, modes, the GPU's stream.

They belong to the thread or the process, and all coroutines run in one thread. So each coroutine's settings are swapped
out while it waits, and its calls run with them. diffusers' attention backend is one of these settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..internals import diffusers as diffusers_internals
from ..internals import torch as internals

ThreadState = tuple[Any, ...]
"""One value per setting; equal states are interchangeable for any computation."""

_AUTOCAST_DEVICES = ("cpu", "cuda")


def _autocast() -> tuple[tuple[str, bool, torch.dtype], ...]:
    if not internals.is_any_autocast_enabled():
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


def _stream() -> torch.cuda.Stream | None:
    """The current stream, whose device is the current one; ``None`` while no GPU is in use."""
    return torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]


def _set_stream(found: torch.cuda.Stream | None) -> None:
    if found is not None:
        torch.cuda.set_stream(found)


def _attention_backend() -> Any:
    return diffusers_internals.AttentionBackendRegistry._active_backend


def _set_attention_backend(found: Any) -> None:
    diffusers_internals.AttentionBackendRegistry.set_active_backend(found)


_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.is_grad_enabled, internals.set_grad_enabled),
    (_autocast, _set_autocast),
    (_stream, _set_stream),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    (internals.get_function_modes, internals.set_function_modes),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (internals.get_deterministic, internals.set_deterministic),
    (torch.get_num_threads, torch.set_num_threads),
    (_attention_backend, _set_attention_backend),
    (internals.get_dispatch_modes, internals.set_dispatch_modes),
    (internals.get_cudnn_enabled, internals.set_cudnn_enabled),
    (internals.get_cudnn_benchmark, internals.set_cudnn_benchmark),
    (internals.get_cudnn_deterministic, internals.set_cudnn_deterministic),
    (internals.get_mkldnn_enabled, internals.set_mkldnn_enabled),
    (internals.get_sdp_priority, internals.set_sdp_priority),
    (internals.get_flash_sdp, internals.set_flash_sdp),
    (internals.get_efficient_sdp, internals.set_efficient_sdp),
    (internals.get_math_sdp, internals.set_math_sdp),
    (internals.get_cudnn_sdp, internals.set_cudnn_sdp),
)

_READS = tuple(read for read, _ in _SETTINGS)


def thread_state() -> ThreadState:
    """The current settings."""
    return (torch.is_inference_mode_enabled(), *[read() for read in _READS])


class Swap:
    """Replaces the current settings ``old`` by ``new`` until :meth:`back`."""

    def __init__(self, old: ThreadState, new: ThreadState) -> None:
        self._old = old
        self._inference = None
        if old[0] != new[0]:
            # inference mode can only be set by entering a context
            self._inference = internals.InferenceMode(new[0])
            self._inference.__enter__()  # type: ignore[no-untyped-call]
            old = thread_state()  # entering changes other settings
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
    """Use the settings ``state`` within the context."""
    swap = Swap(thread_state(), state)
    try:
        yield
    finally:
        swap.back()
