"""Gather tensors that are sharded over a trainer's ranks, one at a time.

Torch's distributed modules take seconds to import, so they are looked up in ``sys.modules``: a program with sharded
tensors has imported them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def rank_and_size() -> tuple[int, int]:
    """The rank and world size of this process in torch.distributed; ``(0, 1)`` without a group."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def whole(tensor: torch.Tensor) -> torch.Tensor | None:
    """Gather ``tensor``. Collective: every rank with a shard must call it; ranks that get no result return ``None``."""
    if _is(tensor, "torch.distributed.tensor", "DTensor"):
        gathered: torch.Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
        return gathered
    if _is(tensor, "torch.distributed._shard.sharded_tensor", "ShardedTensor"):
        return _gather(tensor)
    return tensor


def identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A key that is equal for tensors of the same elements in the same memory, also on ranks without a shard."""
    if _is(tensor, "torch.distributed._shard.sharded_tensor", "ShardedTensor"):
        return (id(tensor),)
    sharded = _is(tensor, "torch.distributed.tensor", "DTensor")
    local: torch.Tensor = tensor.to_local() if sharded else tensor  # type: ignore[attr-defined]
    storage = local.untyped_storage()._cdata  # an empty shard has no address
    return storage, local.storage_offset(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _is(tensor: object, module: str, kind: str) -> bool:
    found = sys.modules.get(module)
    return found is not None and isinstance(tensor, vars(found)[kind])


def _gather(tensor: Any) -> torch.Tensor | None:
    """Gather a ``ShardedTensor`` of FSDP1 on rank 0."""
    import torch

    if rank_and_size()[0] != 0:
        tensor.gather(0, None, dtype=tensor.dtype)
        return None
    device = next((shard.tensor.device for shard in tensor.local_shards()), None)
    gathered = torch.empty(tuple(tensor.size()), dtype=tensor.dtype, device=device)
    tensor.gather(0, gathered, dtype=tensor.dtype)
    return gathered
