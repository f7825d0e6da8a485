"""Noise in place of weights, after which only an update that writes every tensor makes a model what it was."""

from __future__ import annotations

from collections.abc import Mapping

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
    found = {module: _drawn(layouts[module], asked.kept, generator) for module in asked.modules}
    if not any(found.values()):
        raise InvalidRequest("No tensor is left to reset.", field="skip_tensor_list")
    return found


def _drawn(layout: Layout, kept: list[str], generator: torch.Generator) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    tied: set[object] = set()
    for entry in layout:
        value, local = torch.rand((), generator=generator), layout.local(entry.name)
        is_kept = any(part in entry.name for part in kept) or not local.is_floating_point()
        if not is_kept and memory_of(local) not in tied:
            found[entry.name] = value.expand(entry.shape)
            tied |= {memory_of(local)} if local.numel() else set()  # a rank may have no part of it
    return found
