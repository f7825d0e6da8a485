"""Admission: a compiled block must be about as near to the exact result as the plain block is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..internals.block_arguments import Arguments, tensors
from .program import DoesNotFit, Graph, Program

Outputs = Sequence[torch.Tensor]
"""The floating-point tensors that a block returns."""

Judge = Callable[[Outputs, Outputs, Outputs | None], str | None]
"""The reason why outputs are too far from the plain block's, or from those in fp64 if there are any; or ``None``."""


class NotAdmitted(Exception):
    """The compiled block does not serve; the message is the reason."""


def admit(program: Program, graph: Graph, block: nn.Module, arguments: Arguments, judge: Judge) -> None:
    """Compare ``graph`` with the plain ``block``, which is changed by it. Raises ``NotAdmitted``."""
    given = copy.deepcopy(arguments)
    plain = _outputs(program.plain(block, arguments))
    if not _equal(given.tensors(), arguments.tensors()):
        raise NotAdmitted(f"{program.cls.__name__} writes to its arguments")
    try:
        found = _outputs(graph.run(block, arguments))
    except DoesNotFit:
        message = f"the graph of {program.cls.__name__} does not fit the arguments that it was made from"
        raise NotAdmitted(message) from None
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in plain]:
        raise NotAdmitted(f"{program.cls.__name__} returns tensors of other shapes")
    low_precision = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in block.parameters())
    reference = _outputs(program.plain(block.to(torch.float64), given.map(_widened))) if low_precision else None
    if (reason := judge(found, plain, reference)) is not None:
        raise NotAdmitted(f"{program.cls.__name__}: {reason}")


def _outputs(value: Any) -> list[torch.Tensor]:
    return [tensor for tensor in tensors(value) if tensor.is_floating_point()]


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _equal(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
