"""Page-locked memory that many tensors share."""

from __future__ import annotations

import torch

from ..parallel.device import pinned

ALIGNMENT = 256
"""Bytes; what a GPU's own allocations are aligned to."""

_MAX_PIECE = 1 << 30
"""Bytes of a piece, unless one tensor needs more: locking takes a second for three of them."""


class PinnedMemory:
    """Page-locked memory for ``expected`` bytes, which is cut from pieces.

    torch's allocator takes the next power of two of the bytes asked for, so nothing else is asked for.
    """

    def __init__(self, expected: int) -> None:
        self._left = expected
        self._pieces: list[torch.Tensor] = []
        self._used: list[int] = []

    @property
    def nbytes(self) -> int:
        """The bytes that were taken of the system."""
        return sum(piece.nbytes for piece in self._pieces)

    def cut(self, size: int) -> torch.Tensor:
        """``size`` bytes that nothing else uses, where possible next to the last ones. Raises ``OSError``."""
        size = aligned(size)
        number = next((at for at, used in enumerate(self._used) if self._pieces[at].nbytes - used >= size), None)
        if number is None:
            number = len(self._pieces)
            self._pieces.append(pinned(self._piece(size)))
            self._used.append(0)
        start = self._used[number]
        self._used[number] += size
        self._left -= size
        return self._pieces[number][start : start + size]

    def _piece(self, size: int) -> int:
        """Bytes of a new piece: at least ``size``, and no more than is still expected if that is enough."""
        smallest = 1 << (size - 1).bit_length()
        wanted = min(max(self._left, size), _MAX_PIECE)
        return max(smallest, 1 << (wanted.bit_length() - 1))


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
