"""Staging buffers on a GPU for the tensors of an update.

*Prepare* stages the new bytes there. *Write* swaps them with the old ones at the rate of the GPU's memory, a hundred
times that of the bus, and the buffer then belongs to the undo log.
"""

from __future__ import annotations

import torch

from ...parallel.device import free_bytes
from .page_swap import is_dense

_SHARE = 2
"""All buffers take at most one part in this many of the memory that is free before the first.

Forwards between *prepare* and *write* need some."""

_SCRATCH = 64 << 20
"""Bytes that are swapped at a time."""


class StagingBuffers:
    """Gives out buffers on ``device``. A buffer is an ordinary tensor, whose memory torch's allocator takes back."""

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self._device = device
        self._enabled = enabled and device.type == "cuda"
        self._max_bytes = 0
        self._scratch: torch.Tensor | None = None
        self.taken = 0
        """Bytes of the buffers that are given out, and of the scratch buffer of swaps."""

    def measure(self) -> None:
        """Decide how much all buffers may take together, unless some are given out already."""
        if self._enabled and not self.taken:
            cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
            self._max_bytes = int(free_bytes(self._device) + cached) // _SHARE

    def buffer_for(self, like: torch.Tensor) -> torch.Tensor | None:
        """A buffer for a tensor like ``like``; ``None`` if it is on the host or has gaps, or if memory is short."""
        needed = like.nbytes + (0 if self._scratch is not None else _SCRATCH)
        if like.device.type != "cuda" or not is_dense(like) or self.taken + needed > self._max_bytes:
            return None
        try:
            if self._scratch is None:  # taken now, so that a swap never asks for memory
                self._scratch = torch.empty(_SCRATCH, dtype=torch.uint8, device=self._device)
            buffer = torch.empty_like(like)
        except torch.OutOfMemoryError:  # what is free is in pieces, or somebody else took it
            self._max_bytes = 0
            self.give_back(self.taken)
            return None
        self.taken += needed
        return buffer

    def swap(self, one: torch.Tensor, other: torch.Tensor) -> None:
        """Swap the bytes of a tensor and its buffer, in the order of the current stream."""
        assert self._scratch is not None, "taken with the first buffer"
        for here, there in zip(torch.split(_bytes(one), _SCRATCH), torch.split(_bytes(other), _SCRATCH), strict=True):
            between = self._scratch[: len(here)]
            between.copy_(here)
            here.copy_(there)
            there.copy_(between)

    def give_back(self, taken: int = 0) -> None:
        """Count the buffers as free that were given out since ``taken`` bytes were taken."""
        self.taken = taken
        if not taken:
            self._scratch = None


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a dense tensor, in the order of its memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
