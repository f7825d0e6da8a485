"""The undo log: memory for the bytes that an update overwrites. The next update uses host memory again.

A tensor that owns its pages gets other pages to swap with, and a tensor on a GPU gets a buffer there while there is
memory: the new bytes are staged in it, and the old ones end in it. Other tensors are copied into blocks. Fresh memory
costs more than the copy, because the kernel clears every page first (1 GB: 0.1 s to copy, 0.5 s into fresh pages of
4 KB, 0.2 s into fresh pages of 2 MB).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ...internals.torch import empty_host_cache
from ...parallel.device import pinned
from ..progress import OnProgress
from . import page_swap
from .staging_buffers import StagingBuffers

MIN_BLOCK = 64 << 20
"""Bytes of a block, unless one tensor needs more or the limit allows fewer."""

_MAX_PINNED_BLOCK = 1 << 30
"""Bytes of a block of page-locked memory, unless one tensor needs more: locking takes a second for three of them."""

_ALIGNMENT = 64
_PAGE = 2 << 20


class UndoBudgetExceeded(Exception):
    """The undo log needs more memory than allowed; the message says how much, and what to do."""


@dataclass(slots=True, eq=False)
class _Block:
    memory: torch.Tensor  # of bytes
    in_file: bool
    used: int = 0


class UndoLog:
    """Reserves copies of tensors on ``device``: at most ``limit`` bytes of memory, then files in ``spill`` if given.

    ``limit`` bounds the bytes that are really taken of the host; ``gpu`` has the buffers on the GPU, not counted.
    """

    def __init__(
        self,
        device: torch.device,
        limit: int,
        spill: Path | None,
        *,
        on_gpu: bool = True,
        on_progress: OnProgress = lambda: None,
    ) -> None:
        self.gpu = StagingBuffers(device, enabled=on_gpu)
        self._device = device
        self._limit = limit
        self._spill = spill
        self._on_progress = on_progress
        self._blocks: list[_Block] = []
        self._pages: list[torch.Tensor] = []  # reserved
        self._unused: dict[tuple[int, int], list[torch.Tensor]] = {}  # by size and offset in a page

    def reserve(self, tensors: Iterable[torch.Tensor]) -> tuple[list[torch.Tensor], Callable[[], None]]:
        """Memory for a copy of each tensor, and a function that gives all of it back.

        While there is memory, a tensor that owns its pages gets pages to swap with, and one on a GPU a buffer there.
        Later reservations must be given back first. Raises :class:`UndoBudgetExceeded`, and reserves nothing then.
        """
        wanted = list(tensors)
        used_before = [block.used for block in self._blocks]
        number_of_pages, taken_on_gpu = len(self._pages), self.gpu.taken

        def give_back() -> None:
            for number, block in enumerate(self._blocks):
                block.used = used_before[number] if number < len(used_before) else 0
            self._give_pages_back(number_of_pages)
            self.gpu.give_back(taken_on_gpu)

        self.gpu.measure()
        own = {
            number: memory for number, tensor in enumerate(wanted) if (memory := self._swappable(tensor)) is not None
        }
        left = sum(_rounded(tensor.nbytes) for number, tensor in enumerate(wanted) if number not in own)
        reserved = []
        try:
            for number, tensor in enumerate(wanted):
                if number in own:
                    reserved.append(own[number])
                    continue
                reserved.append(self._cut_from_block(tensor, left))
                left -= _rounded(tensor.nbytes)
        except UndoBudgetExceeded:
            give_back()
            raise
        return reserved, give_back

    def clear(self) -> None:
        """Drop every copy. The memory stays for the next update; files are deleted."""
        self._blocks = [block for block in self._blocks if not block.in_file]
        for block in self._blocks:
            block.used = 0
        self._give_pages_back(0)
        self.gpu.give_back()

    def free(self) -> None:
        """Give unused memory back to the system."""
        self._unused.clear()
        if not any(block.used for block in self._blocks):
            self._blocks.clear()
        if self._device.type == "cuda":  # torch keeps both kinds of memory when they are freed
            empty_host_cache()
            torch.cuda.empty_cache()

    def _swappable(self, like: torch.Tensor) -> torch.Tensor | None:
        """Memory to swap with that of ``like``; ``None`` where ``like`` cannot be swapped, or where memory is short."""
        if not page_swap.owns_pages(like):
            return self.gpu.buffer_for(like)
        offset = like.data_ptr() % mmap.PAGESIZE
        if unused := self._unused.get((like.nbytes, offset)):
            pages = unused.pop()
        else:
            if self._held() + like.nbytes > self._limit:
                self.free()
            if self._held() + like.nbytes > self._limit:
                return None
            try:
                pages = page_swap.allocate_pages(like.nbytes, offset)
            except OSError:
                return None
        self._pages.append(pages)
        return page_swap.view_as(pages, like)

    def _give_pages_back(self, remaining: int) -> None:
        """Make reserved pages reusable, except the first ``remaining``."""
        for pages in self._pages[remaining:]:
            self._unused.setdefault((pages.nbytes, pages.data_ptr() % mmap.PAGESIZE), []).append(pages)
        del self._pages[remaining:]

    def _held(self) -> int:
        """Bytes of memory, reserved or reusable."""
        unused = (pages for alike in self._unused.values() for pages in alike)
        blocks = sum(block.memory.nbytes for block in self._blocks if not block.in_file)
        return blocks + sum(pages.nbytes for pages in (*self._pages, *unused))

    def _cut_from_block(self, like: torch.Tensor, left: int) -> torch.Tensor:
        """Memory of a block for one tensor, where ``left`` bytes are still needed in all."""
        size = _rounded(like.nbytes)
        block = next((block for block in self._blocks if block.memory.nbytes - block.used >= size), None)
        if block is None:
            self.free()  # blocks that are too small count against the limit
            block = self._new_block(size, left)
            self._blocks.append(block)
        memory = block.memory[block.used : block.used + like.nbytes]
        block.used += size
        return memory.view(like.dtype).view(like.shape)

    def _new_block(self, size: int, left: int) -> _Block:
        """A block for a tensor of ``size`` bytes, and for more of the ``left`` bytes that are needed."""
        held = self._held()
        free = self._limit - held
        if self._device.type == "cuda":
            in_memory = _pinned_block(size, left, free)
        else:
            in_memory = min(_paged(left), free) if left <= free else 0
        if in_memory:
            return _Block(self._in_memory(in_memory), in_file=False)
        if self._spill is not None:
            return _Block(_spilled(self._spill, _paged(left)), in_file=True)
        raise UndoBudgetExceeded(
            f"The undo log needs {-(-(held + left) // 1_000_000)} MB on each rank, and "
            f"{self._limit // 1_000_000} MB are allowed. Start the server with a larger --undo-mb, or --undo-spill."
        )

    def _in_memory(self, size: int) -> torch.Tensor:
        try:
            if self._device.type == "cuda":
                self._on_progress()
                return pinned(size)
            mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise UndoBudgetExceeded(f"There is no memory for the undo log ({error}).") from error
        with contextlib.suppress(OSError):  # a kernel without large pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(mapped, dtype=torch.uint8)


def in_file(folder: Path, size: int) -> torch.Tensor:
    """Bytes backed by an unnamed file in ``folder``, which disappears with them. Raises ``OSError``."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)


def _spilled(folder: Path, size: int) -> torch.Tensor:
    try:
        return in_file(folder, size)
    except OSError as error:
        raise UndoBudgetExceeded(f"The undo log has no room in {folder}: {error.strerror or error}.") from error


def _paged(size: int) -> int:
    return -(-max(size, MIN_BLOCK) // _PAGE) * _PAGE


def _pinned_block(size: int, left: int, free: int) -> int:
    """Bytes of a block of page-locked memory, at least ``size`` and at most ``free``; 0 where there is no such block.

    torch's allocator takes the next power of two of the bytes asked for, so nothing else is asked for.
    """
    smallest = 1 << (size - 1).bit_length()
    if smallest > free:
        return 0
    wanted = min(max(left, MIN_BLOCK), _MAX_PINNED_BLOCK, free)
    return max(smallest, 1 << (wanted.bit_length() - 1))


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
