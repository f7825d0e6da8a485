"""Gives the tensors of a ``state_dict`` their checkpoint names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from .layout import Layout
from .names import Names, Tensors, ignored_names, memory_of


def names_of(module: nn.Module, layout: Layout, own: Callable[[str], str] = str) -> Names:
    """The names of a module whose weights are loaded and tied."""
    state = module.state_dict()
    by_memory = {memory_of(tensor): entry.name for entry in layout if (tensor := layout.live(entry.name)).numel()}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        known = layout.checkpoint_name(name) or by_memory.get(memory_of(tensor))
        if name not in layout and known is not None:
            aliases[name] = known
    return Names(
        aliases,
        frozenset(name for name, _ in module.named_buffers() if name not in state),
        ignored_names(module),
        own,
    )


@dataclass(frozen=True, slots=True)
class Tied:
    """A tensor of ``module`` that was sent as ``name``, in addition to the one that the checkpoint calls ``known``."""

    module: str
    name: str
    known: str
    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class Named:
    """``tensors`` by checkpoint name, those ``tied`` to them, and names that are ``left_out``."""

    tensors: Tensors
    tied: list[Tied] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def by_checkpoint_names(given: Tensors, layouts: Mapping[str, Layout]) -> Named:
    """Rename the tensors to their checkpoint names. Unknown names stay."""
    named = Named({})
    for module, tensors in given.items():
        found = named.tensors[module] = dict[str, torch.Tensor]()
        layout = layouts.get(module)
        for name, tensor in tensors.items():
            known = name if layout is None or name in layout else layout.names.aliases.get(name)
            if known is None and layout is not None and layout.names.leaves_out(name):
                named.left_out.append(name if len(given) == 1 else f"{module}.{name}")
            elif known is None or known == name:
                found[name] = tensor
            elif known in tensors or known in found:
                named.tied.append(Tied(module, name, known, tensor))
            else:
                found[known] = tensor
    return named
