"""Tensors in pages of their own, on a CPU, which can change places with others: an update is exchanged, not copied.

New bytes are read into pages beside the model while nothing is written yet. Then the pages trade places, by an entry in
a table for many of them at once (measured: 2 to 12 ms for 1.2 GB, which take 80 ms to copy): every address is as it
was, the new bytes are there, and the old ones are what undoes it. See docs/decisions/0010.

The call is ``mremap`` with ``MREMAP_DONTUNMAP`` (Linux 5.7), so that no address is free for a moment.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

LEAST = 1 << 18
"""Bytes of a tensor that gets pages of its own: smaller ones are copied as fast."""

ALIGNMENT = 64
"""Where a tensor begins within so many bytes decides the last bits of some CPU kernels, so it is kept."""

_MAYMOVE, _FIXED, _DONTUNMAP = 1, 2, 4
_FAILED = ctypes.c_void_p(-1).value
_LARGE = 2 << 20
"""Bytes of a large page: its addresses are multiples of that, and it moves as one entry."""


class PagesLost(BaseException):
    """The pages of a tensor are neither here nor there: the end of this process."""


@dataclass(frozen=True, slots=True)
class _Mapping:
    """Private memory with one tensor in it, of ``used`` bytes."""

    address: int
    size: int
    used: int


_known: dict[int, _Mapping] = {}
"""By the address of the tensor's first byte."""


def settle(modules: Iterable[nn.Module]) -> None:
    """Give every large parameter and buffer on a CPU pages of its own, where pages can be exchanged."""
    if not can_exchange():
        return
    moved: dict[tuple[object, ...], torch.Tensor] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            old = tensor.data
            large = type(old) is torch.Tensor and old.device.type == "cpu" and old.nbytes >= LEAST
            if large and is_dense(old) and not have_own(old):
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
    mapping = _map(-(-(offset + size) // mmap.PAGESIZE) * mmap.PAGESIZE, size)
    memory = (ctypes.c_ubyte * mapping.size).from_address(mapping.address)
    first = mapping.address + offset
    _known[first] = mapping
    weakref.finalize(memory, _unmap, first).atexit = False
    return torch.frombuffer(memory, dtype=torch.uint8)[offset : offset + size]


def have_own(tensor: torch.Tensor) -> bool:
    """Whether the tensor, all of it and nothing else, is in pages of its own."""
    mapping = _known.get(tensor.data_ptr()) if tensor.device.type == "cpu" and tensor.numel() else None
    return mapping is not None and mapping.used == tensor.nbytes and is_dense(tensor)


def exchange(one: torch.Tensor, other: torch.Tensor) -> None:
    """Have two tensors with pages of their own, as large and at the same offset, trade their bytes.

    Raises ``OSError`` where the kernel has no room in its tables; both are as they were then.
    """
    first, second = (_known[tensor.data_ptr()] for tensor in (one, other))
    if first.size != second.size or one.data_ptr() - first.address != other.data_ptr() - second.address:
        raise ValueError("tensors of different places in their pages")
    between = _map(first.size, 0)
    done: list[tuple[int, int]] = []
    turns = ((first, between), (second, first), (between, second))
    try:
        for source, target in turns:
            _move(source.address, target.address, first.size)
            done.append((target.address, source.address))
    except OSError:
        try:
            for there, here in reversed(done):
                _move(there, here, first.size)
        except OSError as error:
            raise PagesLost(f"pages cannot be put back: {error}") from error
        raise
    finally:
        _libc().munmap(between.address, between.size)


@functools.cache
def can_exchange() -> bool:
    """Whether this machine's kernel exchanges pages."""
    try:
        one, other = pages(3, 1).fill_(1), pages(3, 1).fill_(2)
        exchange(one, other)
    except (OSError, AttributeError):  # an older kernel, or none of Linux's
        return False
    return [*one.tolist(), *other.tolist()] == [2, 2, 2, 1, 1, 1]


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the tensor has its bytes without gaps, in whatever order."""
    return tensor.stride() == _dense_strides(tensor)


def laid_out(room: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The bytes ``room`` as a tensor like the other, with its strides where it has no gaps."""
    return room.view(like.dtype).as_strided(like.shape, _dense_strides(like))


def _dense_strides(like: torch.Tensor) -> tuple[int, ...]:
    return torch.empty_like(like, device="meta").stride()


def _map(size: int, used: int) -> _Mapping:
    """New memory, at an address where it can be in large pages if it is large. Raises ``OSError``."""
    spare = _LARGE if size >= _LARGE else 0
    start = _libc().mmap(
        None, size + spare, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
    )
    if start == _FAILED:
        raise _error()
    address = -(-start // _LARGE) * _LARGE if spare else start
    for begin, end in ((start, address), (address + size, start + size + spare)):
        if end > begin:
            _libc().munmap(begin, end - begin)
    if spare:
        _libc().madvise(address, size, mmap.MADV_HUGEPAGE)  # which a kernel without large pages refuses
    return _Mapping(address, size, used)


def _unmap(first: int) -> None:
    mapping = _known.pop(first)
    _libc().munmap(mapping.address, mapping.size)


def _move(source: int, target: int, size: int) -> None:
    """Move pages; there are empty ones where they were. Raises ``OSError``."""
    if _libc().mremap(source, size, size, _MAYMOVE | _FIXED | _DONTUNMAP, target) == _FAILED:
        raise _error()


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes = [address, size, number, number, number, ctypes.c_long]
    libc.munmap.argtypes = [address, size]
    libc.madvise.argtypes = [address, size, number]
    libc.mremap.argtypes = [address, size, size, number, address]
    libc.mmap.restype = libc.mremap.restype = address
    return libc
