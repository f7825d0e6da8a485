"""The arguments of a block's call, as the compiler treats them: which calls are alike, and which sizes may change."""

from __future__ import annotations

from typing import Any

import torch

from ..internals import dynamo
from ..internals.block_arguments import Arguments, Mark, Signature


def signature_of(arguments: Arguments) -> Signature:
    """Equal for calls that a graph treats alike."""
    return arguments.signature(_mark)


def contiguous(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Activations in memory of their own order: one graph, where views of a longer sequence would need another."""
    return Arguments(
        tuple(_contiguous(value) for value in args),
        {name: _contiguous(value) for name, value in kwargs.items()},
    )


def mark_rows(arguments: Arguments) -> None:
    """Let the first dimension be dynamic in tensors that have the first one's; a single row stays special."""
    found = [tensor for tensor in arguments.tensors() if tensor.ndim > 0]
    rows = len(found[0]) if found else 0
    for tensor in found:
        if len(tensor) == rows > 1:
            dynamo.maybe_mark_dynamic(tensor, 0)


def _mark(value: Any) -> Mark:
    if isinstance(value, torch.Tensor):
        return (value.shape, value.dtype, value.is_contiguous())
    return (type(value),)


def _contiguous(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.ndim < 3 or (value.is_contiguous() and len(value) > 1):
        return value
    return value.reshape(-1).view(value.shape)  # also the stride of a single row, which nothing else reads
