"""Undocumented names of torch that workers use. Every forward needs them, so they are imported at once."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _device
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode
from torch.utils._python_dispatch import _push_mode as _push_dispatch_mode

CHECKED = "2.13.0"

InferenceMode = torch._C._InferenceMode
is_any_autocast_enabled = torch._C._is_any_autocast_enabled
is_in_bad_fork = torch.cuda._is_in_bad_fork

set_grad_enabled = torch._C._set_grad_enabled
get_cudnn_enabled, set_cudnn_enabled = torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled
get_cudnn_benchmark, set_cudnn_benchmark = torch._C._get_cudnn_benchmark, torch._C._set_cudnn_benchmark
get_cudnn_deterministic, set_cudnn_deterministic = torch._C._get_cudnn_deterministic, torch._C._set_cudnn_deterministic
get_mkldnn_enabled, set_mkldnn_enabled = torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled
get_flash_sdp, set_flash_sdp = torch._C._get_flash_sdp_enabled, torch._C._set_sdp_use_flash
get_efficient_sdp, set_efficient_sdp = torch._C._get_mem_efficient_sdp_enabled, torch._C._set_sdp_use_mem_efficient
get_math_sdp, set_math_sdp = torch._C._get_math_sdp_enabled, torch._C._set_sdp_use_math
get_cudnn_sdp, set_cudnn_sdp = torch._C._get_cudnn_sdp_enabled, torch._C._set_sdp_use_cudnn


def get_sdp_priority() -> tuple[int, ...]:
    """The order in which torch tries the kernels of scaled dot-product attention."""
    return tuple(torch._C._get_sdp_priority_order())


def set_sdp_priority(order: tuple[int, ...]) -> None:
    torch._C._set_sdp_priority_order(list(order))


def get_deterministic() -> tuple[bool, bool]:
    """The two settings of ``torch.use_deterministic_algorithms``: ``mode`` and ``warn_only``."""
    return torch._C._get_deterministic_algorithms(), torch._C._get_deterministic_algorithms_warn_only()


def set_deterministic(found: tuple[bool, bool]) -> None:
    torch._C._set_deterministic_algorithms(found[0], warn_only=found[1])


def get_function_modes() -> tuple[Any, ...]:
    """The default device (torch keeps it as a mode) and the stack of function modes; empty if there are none."""
    if not torch._C._len_torch_function_stack():
        return ()
    context = vars(torch._GLOBAL_DEVICE_CONTEXT).get("device_context")
    return (_device.CURRENT_DEVICE, context, *_get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def set_function_modes(found: tuple[Any, ...]) -> None:
    for _ in range(torch._C._len_torch_function_stack()):
        _pop_mode()  # type: ignore[no-untyped-call]
    _device.CURRENT_DEVICE, torch._GLOBAL_DEVICE_CONTEXT.device_context, *modes = found or (None, None)
    for mode in modes:
        _push_mode(mode)  # type: ignore[no-untyped-call]


def get_dispatch_modes() -> tuple[Any, ...]:
    return tuple(_get_current_dispatch_mode_stack()) if torch._C._len_torch_dispatch_stack() else ()


def set_dispatch_modes(found: tuple[Any, ...]) -> None:
    for _ in range(torch._C._len_torch_dispatch_stack()):
        _pop_dispatch_mode()
    for mode in found:
        _push_dispatch_mode(mode)


def set_collective_timeout(group: dist.ProcessGroup, timeout_s: float) -> None:
    """Bound every later collective of ``group``: after ``timeout_s`` gloo raises, and NCCL ends the process."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def storage_use_count(storage: torch.UntypedStorage) -> int:
    """How many tensors, views among them, and Python objects refer to ``storage``."""
    return int(torch._C._storage_Use_Count(storage._cdata))


def empty_host_cache() -> None:
    """Give unused page-locked memory back to the system, in a build of torch for GPUs.

    ``torch.accelerator.empty_host_cache`` is younger than the releases of torch that machines with GPUs often have.
    """
    torch._C._host_emptyCache()
