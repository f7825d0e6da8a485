"""The memory that recordings read their arguments from: the same for all blocks that are called alike."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch


class _Held(NamedTuple):
    """The values of ``tensor`` as of ``version`` are in a buffer, unless the buffer has another version now."""

    tensor: weakref.ref[torch.Tensor]
    version: int
    buffer_version: int


class StaticInputs:
    """One buffer for each tensor of the arguments, of its shape, strides and dtype.

    A call has every tensor of its signature, so every byte of every buffer is written before each replay, but for a
    tensor that the buffer holds already: the same one, not written to since, in the same forward.
    """

    @torch.inference_mode(mode=False)
    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.buffers = [torch.empty_like(tensor) for tensor in tensors]
        self._pass: object = None
        self._held: list[_Held | None] = []

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def fill(self, tensors: Sequence[torch.Tensor], forward_pass: object) -> None:
        """Copy ``tensors`` into the buffers; ``forward_pass`` stands for the forward."""
        if forward_pass is not self._pass:
            self._pass, self._held = forward_pass, [None] * len(self.buffers)
        for index, (buffer, tensor) in enumerate(zip(self.buffers, tensors, strict=True)):
            if tensor.is_inference():  # it has no version
                self._held[index] = None
                buffer.copy_(tensor)
            elif not _is_held(self._held[index], tensor, buffer):
                buffer.copy_(tensor)
                self._held[index] = _Held(weakref.ref(tensor), tensor._version, buffer._version)


def _is_held(held: _Held | None, tensor: torch.Tensor, buffer: torch.Tensor) -> bool:
    if held is None or held.tensor() is not tensor:
        return False
    return held.version == tensor._version and held.buffer_version == buffer._version
