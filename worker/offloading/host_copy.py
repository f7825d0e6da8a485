"""The host copy of some tensors: the authoritative one, which updates and digests find in the tensors themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..parallel.device import pinned
from ..weights.update.page_swap import view_as

_ALIGNMENT = 256
"""Bytes; what a GPU's own allocations are aligned to."""


class HostCopy:
    """Keeps the values of ``tensors`` in page-locked memory, together, so that one copy brings all to the device.

    At rest the tensors are views of it. Raises ``OSError`` where there is no such memory.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = [tensor for tensor in tensors if tensor.numel()]
        self._starts: list[int] = []
        self.nbytes = 0
        for tensor in self._tensors:
            self._starts.append(self.nbytes)
            self.nbytes += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._memory = pinned(self.nbytes)
        self._views = self._views_of(self._memory)
        for tensor, view in zip(self._tensors, self._views, strict=True):
            view.copy_(tensor.data)
        self.rest()

    def copy_to(self, room: torch.Tensor) -> None:
        """Begin the copy to ``room`` on the device, on the current stream."""
        room[: self.nbytes].copy_(self._memory, non_blocking=True)

    def use(self, room: torch.Tensor) -> None:
        """Have the module compute with what lies in ``room``."""
        if not self._tensors or self._tensors[0].data_ptr() == room.data_ptr():
            return
        for tensor, view in zip(self._tensors, self._views_of(room), strict=True):
            tensor.data = view

    def rest(self) -> None:
        for tensor, view in zip(self._tensors, self._views, strict=True):
            tensor.data = view

    def _views_of(self, room: torch.Tensor) -> list[torch.Tensor]:
        return [
            view_as(room[start : start + tensor.nbytes], tensor)
            for start, tensor in zip(self._starts, self._tensors, strict=True)
        ]
