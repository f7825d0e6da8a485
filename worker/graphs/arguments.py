"""The arguments of a block's call, as recordings read them: the tensors to copy, and all that must be equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..internals.block_arguments import Arguments, Mark, Signature
from .recorder import NotRecordable


@dataclass(frozen=True, slots=True, eq=False)
class RecordableArguments:
    """``tensors`` are those on the component's ``device``, in their order in ``arguments``."""

    arguments: Arguments
    tensors: list[torch.Tensor]
    signature: Signature
    device: torch.device

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Arguments:
        """The same arguments with others in place of :attr:`tensors`."""
        rest = iter(tensors)
        return self.arguments.map(lambda tensor: next(rest) if tensor.device == self.device else tensor)


def read_arguments(arguments: Arguments, device: torch.device) -> RecordableArguments:
    """Raises ``NotRecordable`` for an argument that is not made of tensors, constants, tuples, lists and dicts."""
    tensors: list[torch.Tensor] = []

    def mark(value: Any) -> Mark:
        if not isinstance(value, torch.Tensor):
            raise NotRecordable(f"it is called with a {type(value).__name__}, which has no signature")
        if value.device == device:
            tensors.append(value)
            return (torch.Tensor, value.dtype, value.shape, value.stride())
        if value.device.type == "cpu" and value.ndim == 0:  # kernels take its value, not its address
            return (torch.Tensor, value.dtype, value.item())
        raise NotRecordable(f"it is called with a tensor on {value.device}, and its weights are on {device}")

    return RecordableArguments(arguments, tensors, arguments.signature(mark), device)


def difference(wanted: Signature, recorded: Signature, names: Sequence[str]) -> list[str]:
    """How ``wanted`` differs from ``recorded``, one sentence for each argument; ``names`` are those of ``wanted``."""
    if len(wanted) != len(recorded) or wanted[0] != recorded[0]:
        parts = f"in {len(wanted)} parts, and not {_described(recorded[0])} in {len(recorded)}"
        return [f"it has {_described(wanted[0])} {parts}"]
    return [
        f"{name} is {_described(one)} and not {_described(other)}"
        for name, one, other in zip(names, wanted, recorded, strict=True)
        if one != other
    ]


def _described(mark: Mark) -> str:
    kind, *rest = mark
    if kind is torch.Tensor:
        dtype = str(rest[0]).removeprefix("torch.")
        return f"{dtype} {list(rest[1])}" if isinstance(rest[1], torch.Size) else f"{dtype} {rest[1]}"
    if isinstance(kind, int):
        return f"{kind} positional arguments and {', '.join(map(str, rest)) or 'no others'}"
    assert isinstance(kind, type)
    if kind in (tuple, list):
        return f"a {kind.__name__} of {rest[0]}"
    return f"a dict of {', '.join(map(str, rest))}" if kind is dict else repr(rest[0])
