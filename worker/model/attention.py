"""The attention backend of diffusers' dispatcher, chosen at the start by what runs on this device."""

from __future__ import annotations

import logging

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn

from ...protocol.errors import StartFailed
from ...protocol.replicas import Attention
from ..internals import diffusers as internals

log = logging.getLogger(__name__)

AUTO = "auto"

FASTER = ("_flash_3",)
"""Exact backends that ``auto`` prefers to torch's own, the best first.

``flash``, ``xformers`` and ``_native_cudnn`` are kernels that torch's own attention has too; ``sage`` computes in int8
and fp8.
"""

_NOT_TRIED = ("_hub", "flex")
"""Ends of the names that are not tried unasked: diffusers downloads the first, and the second compiles for seconds."""

_CANNOT_RUN = (ImportError, OSError, RuntimeError, ValueError, TypeError, AssertionError)
"""Errors of diffusers' checks, and of packages for other hardware or other releases of torch."""


def plain_backend() -> str:
    """The backend of plain diffusers: torch's own, or the one of ``DIFFUSERS_ATTN_BACKEND``."""
    active: AttentionBackendName = internals.AttentionBackendRegistry.get_active_backend()[0]
    return str(AttentionBackendName(active).value)


def choose_attention(
    wanted: str, device: torch.device, dtype: torch.dtype, *, shares_tokens: bool = False
) -> Attention:
    """The backend for ``wanted``, which may be "auto". Raises ``StartFailed`` for one that cannot run.

    With ``shares_tokens``, the backend must exchange tokens for heads among ranks; the others ignore that they should.
    """
    plain = plain_backend()
    if shares_tokens and (fault := _unshared(plain)) is not None:
        raise StartFailed(f"DIFFUSERS_ATTN_BACKEND is {plain}, but {fault}; unset it, or serve with --ulysses 1.")
    if wanted != AUTO:
        if (fault := _fault(wanted, device, dtype, shares_tokens)) is not None:
            raise StartFailed(
                f"--attention-backend {wanted} cannot run on {device} in {_short(dtype)} ({fault}); "
                f"available: {', '.join(available(device, dtype, shares_tokens))}."
            )
        return Attention(wanted, "it was asked for", plain)
    if plain != AttentionBackendName.NATIVE.value:
        return Attention(plain, "DIFFUSERS_ATTN_BACKEND names it", plain)
    if device.type != "cuda":
        return Attention(plain, f"nothing is faster on {device.type}", plain)
    faults = {name: _fault(name, device, dtype, shares_tokens) for name in FASTER}
    best = next((name for name, fault in faults.items() if fault is None), None)
    if best is not None:
        return Attention(best, "it is the fastest that runs here", plain)
    return Attention(plain, "; ".join(f"{name} does not run ({fault})" for name, fault in faults.items()), plain)


def use_attention(chosen: Attention) -> None:
    """Have every forward of this process use the backend."""
    internals.AttentionBackendRegistry.set_active_backend(AttentionBackendName(chosen.backend))
    log.info("attention: %s, as %s", chosen.backend, chosen.reason)


def available(device: torch.device, dtype: torch.dtype, shares_tokens: bool = False) -> list[str]:
    """The backends that run on ``device`` at once."""
    names = [name.value for name in internals.AttentionBackendRegistry.list_backends()]
    tried = [name for name in names if not name.endswith(_NOT_TRIED)]
    return sorted(name for name in tried if _fault(name, device, dtype, shares_tokens) is None)


def _unshared(name: str) -> str | None:
    """The reason why ranks cannot share tokens with the backend; ``None`` if they can."""
    if internals.AttentionBackendRegistry._is_context_parallel_available(AttentionBackendName(name)):
        return None
    return "it computes on one rank's tokens alone"


def _fault(name: str, device: torch.device, dtype: torch.dtype, shares_tokens: bool) -> str | None:
    """The reason why the backend cannot compute a small attention; ``None`` if it can."""
    if name not in {known.value for known in internals.AttentionBackendRegistry.list_backends()}:
        return "diffusers has no such backend"
    if shares_tokens and (unshared := _unshared(name)) is not None:
        return unshared
    # 128 positions in 2 heads of 64, a size that every kernel takes
    query = torch.zeros(1, 128, 2, 64, device=device, dtype=dtype)
    try:
        with attention_backend(name):
            dispatch_attention_fn(query, query, query)
    except _CANNOT_RUN as error:
        return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
