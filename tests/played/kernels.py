"""Operators that have kernels of their own on played devices: allocations, copies, views and attention."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.library import Library

from .fallback import different_devices, fallback
from .lagging import copy_later
from .record import RECORD
from .streams import current_device, current_stream
from .tags import CPU_KEY, on_device, on_host

_VIEWS = (
    "as_strided.default", "view.default", "_reshape_alias.default", "unfold.default", "view_as_real.default",
    "view_as_complex.default", "set_.source_Storage_storage_offset", "set_.source_Tensor", "set_.default",
    "set_.source_Storage", "_unsafe_view.default",
)  # fmt: skip
"""Operators that compute nothing: the CPU's kernels make aliases of the same device."""

_COMPOSITE = (
    "convolution", "native_group_norm", "native_layer_norm", "_fused_rms_norm", "upsample_nearest2d",
    "upsample_nearest3d", "_upsample_nearest_exact2d", "constant_pad_nd", "_weight_norm_interface", "native_dropout",
)  # fmt: skip
"""Operators whose composite kernels for CUDA would ask a real device."""


def register_kernels() -> list[Library]:
    """The registrations, which last as long as the returned objects."""
    every, aten = Library("_", "IMPL"), Library("aten", "IMPL")
    every.fallback(fallback, "CUDA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a kernel replaces one of the fallback's
        for name in _VIEWS:
            packet, overload = name.split(".")
            operator = getattr(getattr(torch.ops.aten, packet), overload)
            aten.impl(packet if overload == "default" else name, partial(operator.redispatch, CPU_KEY), "CUDA")
        for name, kernel in _KERNELS.items():
            aten.impl(name, kernel, "CUDA")
        for name in _COMPOSITE:
            with contextlib.suppress(RuntimeError):  # this version of torch has a kernel that needs none
                aten.impl(name, partial(fallback, getattr(torch.ops.aten, name).default), "CUDA")
    return [every, aten]


def _empty(
    size: Any,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: torch.device | None = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> torch.Tensor:
    RECORD.operators["empty"] += 1
    made = torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format)
    return on_device(made, _index(device))


def _empty_strided(
    size: Any,
    stride: Any,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: torch.device | None = None,
    pin_memory: Any = None,
) -> torch.Tensor:
    RECORD.operators["empty"] += 1
    return on_device(torch.empty_strided(size, stride, dtype=dtype), _index(device))


def _index(device: torch.device | None) -> int:
    if device is None or device.index is None or device.index < 0:
        return current_device()
    return device.index


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    RECORD.operators["aten::copy_"] += 1
    on_cuda = target if target.device.type == "cuda" else source
    stream = current_stream(on_cuda.device)
    if target.device.type != source.device.type:
        direction = "D2H" if target.device.type == "cpu" else "H2D"
        if non_blocking:
            RECORD.operators[f"copy {direction} without waiting"] += 1
        else:
            RECORD.wait(f"copy {direction}")
        if non_blocking and stream.lags and (source if direction == "H2D" else target).is_pinned():
            copy_later(stream, target, source)
            return target
    stream.catch_up()
    on_host(target).copy_(on_host(source))
    return target


def _resize(tensor: torch.Tensor, size: Any, memory_format: Any = None) -> torch.Tensor:
    """Resize in place if the storage is large enough, else into new memory: the storage itself cannot grow."""
    needed = (tensor.storage_offset() + torch.Size(size).numel()) * tensor.itemsize
    if needed > tensor.untyped_storage().nbytes():
        made = on_device(torch.empty(size, dtype=tensor.dtype), tensor.device.index)
    else:
        stride = torch.empty(size, device="meta").stride()
        made = torch.ops.aten.as_strided.default.redispatch(CPU_KEY, tensor, size, stride, tensor.storage_offset())
    torch.ops.aten.set_.source_Tensor.redispatch(CPU_KEY, tensor, made)
    return tensor


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """One kernel, as on a GPU: the composite one would ask the device which kernels it has."""
    RECORD.operators["scaled_dot_product_attention"] += 1
    for tensor in (key, value, attn_mask):
        if tensor is not None and tensor.device != query.device:
            raise different_devices("scaled_dot_product_attention", tensor, query.device)
    made = torch.nn.functional.scaled_dot_product_attention(
        on_host(query),
        on_host(key),
        on_host(value),
        None if attn_mask is None else on_host(attn_mask),
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    return on_device(made.contiguous(), query.device.index)


_KERNELS: dict[str, Callable[..., torch.Tensor]] = {
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "copy_": _copy,
    "resize_": _resize,
    "scaled_dot_product_attention": _attention,
}
