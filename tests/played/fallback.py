"""Operators on played CUDA tensors: checked as CUDA checks them, then run by the CPU's kernel on the same memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .generators import is_of_cpu
from .record import RECORD
from .streams import current_stream
from .tags import CPU_KEY, on_device, on_host

WAITS = {
    "aten::_local_scalar_dense": "item", "aten::is_nonzero": "item", "aten::equal": "equal",
    "aten::nonzero": "nonzero", "aten::nonzero.out": "nonzero", "aten::masked_select": "masked_select",
    "aten::_unique2": "unique", "aten::unique_dim": "unique", "aten::bincount": "bincount",
    "aten::repeat_interleave.Tensor": "repeat_interleave", "aten::multinomial": "multinomial",
}  # fmt: skip
"""Operators whose result depends on values that the host must read."""

_INDEXING = {
    "aten::index.Tensor", "aten::index.Tensor_out", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
}  # fmt: skip
"""Operators that take indices on the host, too."""


def fallback(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operator without a kernel of its own."""
    schema = operator._schema
    name = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
    leaves, spec = pytree.tree_flatten((args, kwargs))
    device = _checked_device(name, leaves)
    RECORD.use()
    current_stream(device).catch_up()
    RECORD.operators[name] += 1
    if name in WAITS:
        RECORD.wait(WAITS[name])
    if name in _INDEXING:
        _note_indices(args[1], device)
    host = [_host_form(leaf) for leaf in leaves]
    before = [(leaf.data_ptr(), leaf.shape) if isinstance(leaf, torch.Tensor) else None for leaf in host]
    host_args, host_kwargs = pytree.tree_unflatten(host, spec)
    result = operator(*host_args, **host_kwargs)
    _adopt_resized(leaves, host, before)
    given = {id(one): leaf for one, leaf in zip(host, leaves, strict=True) if isinstance(leaf, torch.Tensor)}
    index = (device.index or 0) if device is not None else 0
    return pytree.tree_map(lambda value: _device_form(value, given, index), result)


def different_devices(name: str, on_cpu: torch.Tensor, device: torch.device) -> RuntimeError:
    return RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {device} and cpu! "
        f"({name}, the one on the CPU has the shape {tuple(on_cpu.shape)} and the dtype {on_cpu.dtype})"
    )


def _checked_device(name: str, leaves: Sequence[Any]) -> torch.device | None:
    """The operands' device. Raises what CUDA raises if they are on several, or for a generator of the CPU."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    found = [tensor.device for tensor in tensors if tensor.device.type == "cuda"]
    for other in found[1:]:
        if other != found[0]:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, "
                f"{found[0]} and {other}! ({name})"
            )
    named = [leaf for leaf in leaves if isinstance(leaf, torch.device) and leaf.type == "cuda"]
    device = next(iter([*found, *named]), None)
    if device is not None and name not in _INDEXING:
        for tensor in tensors:
            if tensor.device.type == "cpu" and tensor.dim() > 0:
                raise different_devices(name, tensor, device)
    if any(is_of_cpu(leaf) for leaf in leaves):
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({name})")
    return device


def _note_indices(indices: Sequence[Any], device: torch.device | None) -> None:
    tensors = [index for index in indices if isinstance(index, torch.Tensor)]
    if any(index.dtype in (torch.bool, torch.uint8) for index in tensors):
        RECORD.wait("index by a mask")
    elif device is not None and any(index.device.type == "cpu" and index.dim() > 0 for index in tensors):
        RECORD.wait("index on the host")


def _host_form(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    if not isinstance(leaf, torch.Tensor) or leaf.device.type != "cuda":
        return leaf
    if leaf.dim() == 1 and leaf.numel() == 0:  # an output for resizing, which DLPack's memory cannot be
        return torch.empty(0, dtype=leaf.dtype)
    return on_host(leaf)


def _adopt_resized(leaves: Sequence[Any], host: Sequence[Any], before: Sequence[Any]) -> None:
    """Give outputs that the kernel resized their new memory."""
    for leaf, one, was in zip(leaves, host, before, strict=True):
        if was is None or leaf.device.type != "cuda" or (one.data_ptr(), one.shape) == was:
            continue
        made = on_device(one.clone(), leaf.device.index)
        torch.ops.aten.set_.source_Tensor.redispatch(CPU_KEY, leaf, made)


def _device_form(value: Any, given: dict[int, Any], index: int) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if id(value) in given:
        return given[id(value)]
    return value if value.device.type == "cuda" else on_device(value, index)
