"""A recorded call of a block: a recording, and the structure of the block's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..internals.torch import storage_use_count
from .recorder import Pool, Recording

_TENSOR = object()
"""Stands for a tensor among the leaves of a block's output."""


class RecordedCall:
    """Replays what ``block`` did, when it was recorded, to the same static inputs.

    What :meth:`replay` returns lies in memory of this call alone, so it stays as it is until the next replay.
    """

    def __init__(self, pool: Pool, block: Callable[[], Any], foreign: Sequence[torch.Tensor]) -> None:
        """``foreign`` are the tensors that the block reads; an output that shares memory with one is copied.

        Raises ``NotRecordable`` and ``torch.OutOfMemoryError``.
        """
        self._spec: pytree.TreeSpec | None = None
        self._leaves: list[Any] = []
        self._foreign = {tensor.untyped_storage().data_ptr() for tensor in foreign}
        self._recording: Recording = pool.record(lambda: self._outputs(block()))
        self._leaves = [_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in self._leaves]
        self._storages = {
            one.data_ptr(): one for one in (output.untyped_storage() for output in self._recording.outputs)
        }
        self._own_references = {address: storage_use_count(one) for address, one in self._storages.items()}

    @property
    def nbytes(self) -> int:
        return self._recording.nbytes

    @property
    def addresses(self) -> set[int]:
        """The addresses of the memory that a replay overwrites and that callers get."""
        return {*self._storages}

    @property
    def is_held(self) -> bool:
        """True while somebody holds what the last replay returned, or a view of it."""
        return any(storage_use_count(one) > self._own_references[address] for address, one in self._storages.items())

    def replay(self) -> Any:
        """Return what the block would, from the static inputs. Requires that it :attr:`is_held` by nobody."""
        self._recording.replay()
        outputs = iter(self._recording.outputs)
        leaves = [next(outputs).detach() if leaf is _TENSOR else leaf for leaf in self._leaves]
        assert self._spec is not None, "recorded before"
        return pytree.tree_unflatten(leaves, self._spec)

    def _outputs(self, output: Any) -> list[torch.Tensor]:
        self._leaves, self._spec = pytree.tree_flatten(output)
        return [self._own(leaf) for leaf in self._leaves if isinstance(leaf, torch.Tensor)]

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if tensor.untyped_storage().data_ptr() in self._foreign else tensor
