"""What else tensors are called: in a module's own state dict, where they are tied, and where no checkpoint has them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..transport.payload import Tensors

if TYPE_CHECKING:
    from .layout import Layout


@dataclass(frozen=True, slots=True)
class Names:
    """What a ``state_dict`` may have beyond a checkpoint.

    ``aliases`` are the checkpoint's names by others of the same memory, ``buffers`` are tensors that the module makes
    for itself, and ``ignored`` are patterns of names that its library reads over. ``own`` makes a checkpoint's name the
    module's.
    """

    aliases: Mapping[str, str] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()
    own: Callable[[str], str] = str

    def leaves_out(self, name: str) -> bool:
        """Whether the module's library itself would read over it."""
        return self.own(name) in self.buffers or any(re.search(pattern, name) for pattern in self.ignored)


def ignored_names(module: nn.Module) -> tuple[str, ...]:
    """Patterns of names that the module's library reads over in a checkpoint.

    transformers has two that stand in no class: buffers that older versions saved
    (``PreTrainedModel._adjust_missing_and_unexpected_keys``).
    """
    own = tuple(sorted(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()))
    if not isinstance(module, PreTrainedModel):
        return own
    buffers = [name for name, _ in module.named_buffers()]
    saved_once = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}
    return (*own, *(pattern for end, pattern in saved_once.items() if any(name.endswith(end) for name in buffers)))


def names_of(module: nn.Module, layout: Layout, own: Callable[[str], str] = str) -> Names:
    """Of a module that is loaded, and whose tensors are tied."""
    state = module.state_dict()
    places = {memory_of(tensor): entry.name for entry in layout if (tensor := layout.live(entry.name)).numel()}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        known = layout.checkpoint_name(name) or places.get(memory_of(tensor))
        if name not in layout and known is not None:
            aliases[name] = known
    return Names(
        aliases,
        frozenset(name for name, _ in module.named_buffers() if name not in state),
        ignored_names(module),
        own,
    )


def memory_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for names of the same memory, if there is any."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


@dataclass(frozen=True, slots=True)
class Tied:
    """A tensor of ``module`` that came as ``name``, beside the one that the checkpoint calls ``known``."""

    module: str
    name: str
    known: str
    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class Named:
    """``tensors`` by the checkpoint's names, those ``tied`` to them, and names that are ``left_out``."""

    tensors: Tensors
    tied: list[Tied] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def by_checkpoint_names(given: Tensors, layouts: Mapping[str, Layout]) -> Named:
    """A name that nobody knows stays as it is."""
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
