"""Components' answers, as caches keep them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree


def tensors_of(answer: Any) -> list[torch.Tensor] | None:
    """The tensors of an answer that holds nothing else; ``None`` for any other answer."""
    leaves = [leaf for leaf in pytree.tree_leaves(answer) if leaf is not None]
    return leaves if all(isinstance(leaf, torch.Tensor) for leaf in leaves) else None


def cloned(answer: Any) -> Any:
    """A copy to keep or to hand out, because pipelines may write to the answers that they get."""
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, answer)
