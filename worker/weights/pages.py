"""Tensors in pages of their own, on a CPU, which can change places with others: an update is exchanged, not copied.

New bytes are read into pages beside the model while nothing is written yet. Then the pages trade places, by an entry in
a table for many of them at once (measured: 2 to 12 ms for 1.2 GB, which take 80 ms to copy): every address is as it
was, the new bytes are there, and the old ones are what undoes it. See docs/decisions/0010.

The call is ``mremap`` with ``MREMAP_DONTUNMAP`` (Linux 5.7), so that no address is free for a moment.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import weakref
from collections.abc import Iterable

import torch
from torch import nn

LEAST = 1 << 18
"""Bytes of a tensor that gets pages of its own: smaller ones are copied as fast."""

ALIGNMENT = 64
"""Where a tensor begins within so many bytes decides the last bits of some CPU kernels, so it is kept."""

_MAYMOVE, _FIXED, _DONTUNMAP = 1, 2, 4


class PagesLost(BaseException):
    """The pages of a tensor are neither here nor there: the end of this process."""


class _Pages(mmap.mmap):
    """Private memory with one tensor in it, of ``used`` bytes."""

    used = 0


_known: weakref.WeakValueDictionary[int, _Pages] = weakref.WeakValueDictionary()
"""By the address of the tensor's first byte."""


def settle(modules: Iterable[nn.Module]) -> None:
    """Give every large parameter and buffer on a CPU pages of its own, where pages can be exchanged."""
    if not can_exchange():
        return
    moved: dict[tuple[object, ...], torch.Tensor] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            old = tensor.data
            if type(old) is torch.Tensor and old.device.type == "cpu" and old.nbytes >= LEAST and is_dense(old):
                place = (old.data_ptr(), old.dtype, old.shape, old.stride())
                if place not in moved:
                    moved[place] = home(old, old.data_ptr() % ALIGNMENT).copy_(old)
                tensor.data = moved[place]


def home(like: torch.Tensor, offset: int) -> torch.Tensor:
    """New memory on the CPU for a tensor like the other, which begins ``offset`` bytes behind an aligned address.

    It has pages of its own where it is large.
    """
    if like.nbytes >= LEAST and can_exchange():
        return laid_out(pages(like.nbytes, offset), like)
    raw = torch.empty(like.nbytes + 2 * ALIGNMENT, dtype=torch.uint8)
    start = (offset - raw.data_ptr()) % ALIGNMENT
    return laid_out(raw[start : start + like.nbytes], like)


def pages(size: int, offset: int) -> torch.Tensor:
    """``size`` bytes that begin ``offset`` bytes behind a page's start, and share their pages with nothing.

    Raises ``OSError`` where there is no memory.
    """
    mapped = _Pages(-1, -(-(offset + size) // mmap.PAGESIZE) * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # a kernel without large pages
        mapped.madvise(mmap.MADV_HUGEPAGE)
    mapped.used = size
    memory = torch.frombuffer(mapped, dtype=torch.uint8)[offset : offset + size]
    _known[memory.data_ptr()] = mapped
    return memory


def have_own(tensor: torch.Tensor) -> bool:
    """Whether the tensor, all of it and nothing else, is in pages of its own."""
    mapped = _known.get(tensor.data_ptr()) if tensor.device.type == "cpu" and tensor.numel() else None
    return mapped is not None and mapped.used == tensor.nbytes and is_dense(tensor)


def exchange(one: torch.Tensor, other: torch.Tensor) -> None:
    """Have two tensors with pages of their own, as large and at the same offset, trade their bytes.

    Raises ``OSError`` where the kernel has no room in its tables; both are as they were then.
    """
    first, second = (_known[tensor.data_ptr()] for tensor in (one, other))
    if len(first) != len(second) or _offset(one) != _offset(other):
        raise ValueError("tensors of different places in their pages")
    between = mmap.mmap(-1, len(first), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    here, there = one.data_ptr() - _offset(one), other.data_ptr() - _offset(other)
    spare = ctypes.addressof(ctypes.c_char.from_buffer(between))
    done: list[tuple[int, int]] = []
    try:
        for source, target in ((here, spare), (there, here), (spare, there)):
            _move(source, target, len(first))
            done.append((target, source))
    except OSError:
        try:
            for source, target in reversed(done):
                _move(source, target, len(first))
        except OSError as error:
            raise PagesLost(f"pages cannot be put back: {error}") from error
        raise


@functools.cache
def can_exchange() -> bool:
    """Whether this machine's kernel exchanges pages."""
    try:
        one, other = pages(3, 1).fill_(1), pages(3, 1).fill_(2)
        exchange(one, other)
    except (OSError, AttributeError):
        return False
    return [*one.tolist(), *other.tolist()] == [2, 2, 2, 1, 1, 1]


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the tensor has its bytes without gaps, in whatever order."""
    return tensor.stride() == torch.empty_like(tensor, device="meta").stride()


def laid_out(room: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The bytes ``room`` as a tensor like the other, with its strides where it has no gaps."""
    strides = torch.empty_like(like, device="meta").stride()
    return room.view(like.dtype).as_strided(like.shape, strides)


def _offset(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() % mmap.PAGESIZE


def _move(source: int, target: int, size: int) -> None:
    """Move pages; there are empty ones where they were."""
    moved = _mremap()(source, size, size, _MAYMOVE | _FIXED | _DONTUNMAP, target)
    if moved != target:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@functools.cache
def _mremap() -> ctypes._CFuncPtr:  # type: ignore[name-defined]
    function = ctypes.CDLL(None, use_errno=True).mremap
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    return function
