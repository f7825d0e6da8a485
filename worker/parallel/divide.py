"""Shrinks a module to one rank's shard, before its weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..internals import diffusers as internals
from .layers import AcrossHeadsRMSNorm, GatheredColumnLinear, RowParallelLinear, VocabularyParallelEmbedding
from .plan import ACROSS_HEADS, COLWISE, GATHERED, SPLIT_OUTPUT, CannotDivide, Family, Shard, Style, matching, resolve
from .ranks import Ranks


def divide(module: nn.Module, family: Family, ranks: Ranks, shards: Mapping[str, Shard]) -> None:
    """Shrink each parameter in ``shards`` (from :func:`.plan.shards`) to this rank's shard, with undefined values.

    The degree must be one of :func:`.plan.degrees`.
    """
    styles = resolve(module, family)
    for pattern, attributes in family.divided.items():
        for _, part in matching(module, pattern):
            for name in attributes:
                setattr(part, name, getattr(part, name) // ranks.size)
    for path, (part, style) in styles.items():
        for name in [name for name, _ in part.named_parameters(recurse=False)]:
            shard = shards.get(f"{path}.{name}")
            if shard is not None:
                _shrink(part, name, shard, ranks.size)
        _become_parallel(part, style, ranks)


def _shrink(part: nn.Module, name: str, shard: Shard, size: int) -> None:
    whole = getattr(part, name)
    shape = list(whole.shape)
    shape[shard.dim] //= size
    setattr(part, name, nn.Parameter(whole.new_empty(shape), requires_grad=whole.requires_grad))


def _become_parallel(part: nn.Module, style: Style, ranks: Ranks) -> None:
    """Give the layer its parallel class if it needs one, and correct the sizes that other code reads from it."""
    if isinstance(part, nn.Embedding):
        part.num_embeddings, part.embedding_dim = part.weight.shape
        if style != COLWISE:
            _change_class(part, VocabularyParallelEmbedding, nn.Embedding, ranks)
    elif style == SPLIT_OUTPUT:
        part.register_forward_hook(lambda _, args, output: _own_part(output, ranks))
    elif style == ACROSS_HEADS:
        _change_class(part, AcrossHeadsRMSNorm, nn.RMSNorm, ranks)
    elif isinstance(part, nn.Linear):
        part.out_features, part.in_features = part.weight.shape
        if style == GATHERED:
            _change_class(part, GatheredColumnLinear, nn.Linear, ranks)
        elif style != COLWISE and not isinstance(style, internals.PackedColwiseParallel):
            _change_class(part, RowParallelLinear, nn.Linear, ranks)
    else:
        raise CannotDivide(f"a {type(part).__name__} cannot be divided as {style!r}")


def _own_part(output: Any, ranks: Ranks) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.chunk(ranks.size, dim=-1)[ranks.rank], output)


def _change_class(part: nn.Module, parallel: type[nn.Module], plain: type[nn.Module], ranks: Ranks) -> None:
    if type(part) is not plain:
        raise CannotDivide(f"a {type(part).__name__} is not exactly a {plain.__name__}")
    part.__class__ = parallel
    vars(part)["ranks"] = ranks
