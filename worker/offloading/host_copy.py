"""The host copy of some tensors: the authoritative one, which updates and digests find in the tensors themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..weights.update.page_swap import view_as
from .pinned_memory import PinnedMemory, aligned


class HostCopy:
    """Keeps the values of ``tensors`` in page-locked ``memory``, together, so that few copies bring all to the device.

    At rest the tensors are views of it. Raises ``OSError`` where there is no such memory.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], memory: PinnedMemory) -> None:
        self._tensors = [tensor for tensor in tensors if tensor.numel()]
        self._starts: list[int] = []
        self._views: list[torch.Tensor] = []
        self._runs: list[tuple[int, torch.Tensor]] = []  # by their starts on the device
        self.nbytes = 0
        for tensor in self._tensors:
            piece = memory.cut(tensor.nbytes)
            self._views.append(view_as(piece[: tensor.nbytes], tensor))
            self._views[-1].copy_(tensor.data)
            self._starts.append(self.nbytes)
            self._extend_runs(piece)
            self.nbytes += aligned(tensor.nbytes)
        self.rest()

    def copy_to(self, buffer: torch.Tensor) -> None:
        """Begin the copy to ``buffer`` on the device, on the current stream."""
        for start, run in self._runs:
            buffer[start : start + run.nbytes].copy_(run, non_blocking=True)

    def use(self, buffer: torch.Tensor) -> None:
        """Have the module compute with what lies in ``buffer``."""
        if not self._tensors or self._tensors[0].data_ptr() == buffer.data_ptr():
            return
        for tensor, start in zip(self._tensors, self._starts, strict=True):
            tensor.data = view_as(buffer[start : start + tensor.nbytes], tensor)

    def rest(self) -> None:
        for tensor, view in zip(self._tensors, self._views, strict=True):
            tensor.data = view

    def _extend_runs(self, piece: torch.Tensor) -> None:
        """Copy ``piece`` with what lies before it in memory, or apart."""
        if self._runs:
            start, run = self._runs[-1]
            if run.untyped_storage().data_ptr() == piece.untyped_storage().data_ptr() and (
                run.data_ptr() + run.nbytes == piece.data_ptr()
            ):
                self._runs[-1] = start, run.as_strided((run.nbytes + piece.nbytes,), (1,), run.storage_offset())
                return
        self._runs.append((self.nbytes, piece))
