"""Names that a ``state_dict`` has beyond a checkpoint: tied tensors, buffers, and names that the library ignores."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

Tensors = dict[str, dict[str, torch.Tensor]]
"""Full tensors by module and checkpoint name. They may be views of memory that another process owns: do not write."""


@dataclass(frozen=True, slots=True)
class Names:
    """Names that a ``state_dict`` may have beyond a checkpoint.

    ``aliases`` are the checkpoint's names by others of the same memory, ``buffers`` are tensors that the module makes
    for itself, and ``ignored`` are patterns of names that its library reads over. ``own`` makes a checkpoint's name the
    module's.
    """

    aliases: Mapping[str, str] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()
    own: Callable[[str], str] = str

    def leaves_out(self, name: str) -> bool:
        """True if the module's own library ignores the name."""
        return self.own(name) in self.buffers or any(re.search(pattern, name) for pattern in self.ignored)


def ignored_names(module: nn.Module) -> tuple[str, ...]:
    """Patterns of names that the module's library ignores in a checkpoint.

    transformers has two that no class declares: buffers that older versions saved
    (``PreTrainedModel._adjust_missing_and_unexpected_keys``).
    """
    own = tuple(sorted(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()))
    if not isinstance(module, PreTrainedModel):
        return own
    buffers = [name for name, _ in module.named_buffers()]
    saved_once = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}
    return (*own, *(pattern for end, pattern in saved_once.items() if any(name.endswith(end) for name in buffers)))


def memory_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A key that is equal for tensors in the same memory."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
