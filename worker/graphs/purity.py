"""Checks that a block's call is a function of its arguments and weights: a replay runs its kernels, and no Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import nn

from ..crossing.overlay import own_attributes
from ..crossing.random_state import has_drawn, random_state, set_random_state
from ..parallel.ranks import Ranks
from .recorder import NotRecordable

_HARMLESS_HOOKS = frozenset({"transformers.utils.output_capturing"})
"""Modules whose hooks do nothing in a recorded call: blocks run eagerly while these collect what is within blocks."""


def check_structure(block: nn.Module) -> None:
    """Raises ``NotRecordable`` for a block with Python code, or collectives, that a replay would leave out."""
    for name, part in block.named_modules():
        if part is not block and ("forward" in vars(part) or _hooks(part)):
            raise NotRecordable(f"its layer {name} has hooks, which a replay would not run")
        if any(isinstance(value, Ranks) and value.size > 1 for value in vars(part).values()):
            raise NotRecordable(f"its layer {name} is divided among ranks, and their collectives are not recorded")
        if getattr(vars(part).get("processor"), "_parallel_config", None) is not None:
            raise NotRecordable(f"its attention {name} is shared by ranks, and their collectives are not recorded")


def _hooks(part: nn.Module) -> list[object]:
    every = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    return [hook for hook in every if hook.__module__ not in _HARMLESS_HOOKS]


class Purity:
    """Around a call of ``block`` with ``inputs``, which must leave these, weights, attributes and random state alone.

    What the call has written to attributes, buffers and the random state is undone, so that the block can be called
    again in its place.
    """

    def __init__(self, block: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
        self._inputs = [(tensor, tensor._version) for tensor in inputs]
        self._weights = [(tensor, tensor._version) for tensor in block.parameters()]
        self._buffers = [(tensor, tensor._version, tensor.clone()) for tensor in block.buffers()]
        self._attributes = [(part, own_attributes(part)) for part in block.modules()]
        self._random = random_state()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        set_random_state(self._random)
        for tensor, version, before in self._buffers:
            if tensor._version != version:
                tensor.copy_(before)
        for part, attributes in self._attributes:
            for name in own_attributes(part).keys() - attributes.keys():
                del vars(part)[name]
            vars(part).update(attributes)

    def check(self) -> None:
        """Raises ``NotRecordable`` if the call has written to any of it."""
        if any(tensor._version != version for tensor, version in self._inputs):
            raise NotRecordable("it writes to its arguments")
        weights_and_buffers = [*self._weights, *((tensor, version) for tensor, version, _ in self._buffers)]
        if any(tensor._version != version for tensor, version in weights_and_buffers):
            raise NotRecordable("it writes to its weights or buffers")
        for part, before in self._attributes:
            after = own_attributes(part)
            if written := [name for name in {**before, **after} if after.get(name) is not before.get(name)]:
                raise NotRecordable(f"it writes to the attribute {written[0]} of {type(part).__name__}")
        if has_drawn(self._random):
            raise NotRecordable("it draws random numbers")


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def addresses(module: nn.Module) -> tuple[int, ...]:
    """Where the weights lie. Recordings are valid as long as these stay the same."""
    return tuple(tensor.data_ptr() for tensor in weights(module))
