"""Noise in place of weights, after which only an update that writes every tensor makes a model what it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ....protocol.errors import InvalidRequest, NotFound
from ....protocol.tensor_sources import Noise
from ..checkpoint.layout import Layout
from ..checkpoint.names import Tensors, memory_of


def noise(asked: Noise, layouts: Mapping[str, Layout]) -> Tensors:
    """Draw one value for each floating-point tensor: a tensor full of it needs no memory.

    Integers stay, as they may be indices. Raises ``NotFound`` for a module that the model does not have, and
    ``InvalidRequest`` if there is nothing to reset.
    """
    absent = [module for module in asked.modules if module not in layouts]
    if absent:
        raise NotFound(f"The model has no module {absent[0]!r}; it has {', '.join(layouts)}.", field="target_modules")
    generator = torch.Generator().manual_seed(asked.seed)
    drawn = {memory for module in asked.modules for memory in _kept(layouts[module], asked.kept)}
    found = {module: _drawn(layouts[module], asked.kept, drawn, generator) for module in asked.modules}
    if not any(found.values()):
        raise InvalidRequest("No tensor is left to reset.", field="skip_tensor_list")
    return found


def _kept(layout: Layout, kept: Sequence[str]) -> set[object]:
    """The memory of the tensors to keep, which others may share."""
    return {_memory(layout, entry.name) for entry in layout if _is_kept(entry.name, kept)} - {None}


def _drawn(
    layout: Layout, kept: Sequence[str], drawn: set[object], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """The values of tensors whose memory is not yet among ``drawn``, to which it is added."""
    found: dict[str, torch.Tensor] = {}
    for entry in layout:
        # from 2 to 3, as no tensor of a model is full of such a number; drawn for each entry, as ranks have other parts
        value, memory = 2 + torch.rand((), generator=generator), _memory(layout, entry.name)
        if _is_kept(entry.name, kept) or memory in drawn or not layout.local(entry.name).is_floating_point():
            continue
        found[entry.name] = value.expand(entry.shape)
        drawn |= {memory} - {None}
    return found


def _is_kept(name: str, kept: Sequence[str]) -> bool:
    return any(part in name for part in kept)


def _memory(layout: Layout, name: str) -> object:
    """A key of the tensor's memory; ``None`` where this rank has no part of it."""
    local = layout.local(name)
    return memory_of(local) if local.numel() else None
