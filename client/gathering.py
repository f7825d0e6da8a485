"""Tensors that are divided among a trainer's ranks, made whole one at a time.

Torch's distributed modules take seconds to import and are not: who has such a tensor has imported them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def rank_and_size() -> tuple[int, int]:
    """This process's place in its torch.distributed group; ``(0, 1)`` where it is in none."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def whole(tensor: torch.Tensor) -> torch.Tensor | None:
    """The whole tensor. Every rank that has a part must call this, and some ranks get ``None`` for it."""
    if _is(tensor, "torch.distributed.tensor", "DTensor"):
        gathered: torch.Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
        return gathered
    if _is(tensor, "torch.distributed._shard.sharded_tensor", "ShardedTensor"):
        return _gather(tensor)
    return tensor


def identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same elements of the same memory; alike on a rank that has none of them."""
    if _is(tensor, "torch.distributed._shard.sharded_tensor", "ShardedTensor"):
        return (id(tensor),)
    divided = _is(tensor, "torch.distributed.tensor", "DTensor")
    local: torch.Tensor = tensor.to_local() if divided else tensor  # type: ignore[attr-defined]
    storage = local.untyped_storage()._cdata  # where there are no elements there is no address
    return storage, local.storage_offset(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _is(tensor: object, module: str, kind: str) -> bool:
    found = sys.modules.get(module)
    return found is not None and isinstance(tensor, vars(found)[kind])


def _gather(tensor: Any) -> torch.Tensor | None:
    """What the first form of FSDP makes of a parameter, on rank 0."""
    import torch

    if rank_and_size()[0] != 0:
        tensor.gather(0, None, dtype=tensor.dtype)
        return None
    place = next((shard.tensor.device for shard in tensor.local_shards()), None)
    gathered = torch.empty(tuple(tensor.size()), dtype=tensor.dtype, device=place)
    tensor.gather(0, gathered, dtype=tensor.dtype)
    return gathered
