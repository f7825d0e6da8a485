"""Page swap: CPU tensors that own their memory pages trade them, so that an update is swapped in and not copied.

The new bytes are first read into pages beside the model. Then the kernel swaps the pages, with one page-table entry for
many of them (2 to 12 ms for 1.2 GB, which takes 80 ms to copy). Addresses stay, and the old bytes are the undo log. See
docs/decisions/0010.

The call is ``mremap`` with ``MREMAP_DONTUNMAP`` (Linux 5.7), so that no address is ever unmapped.
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

MIN_BYTES = 1 << 18
"""Bytes from which a tensor gets pages of its own; smaller tensors are copied as fast."""

ALIGNMENT = 64
"""Some CPU kernels round by a tensor's address modulo this number of bytes, so that offset is kept."""

_MAYMOVE, _FIXED, _DONTUNMAP = 1, 2, 4
_FAILED = ctypes.c_void_p(-1).value
_LARGE = 2 << 20
"""Bytes of a huge page, which is aligned to its size and moves as one page-table entry."""


class PagesLost(BaseException):
    """A swap failed halfway and could not be undone: this process must end."""


@dataclass(frozen=True, slots=True)
class _Mapping:
    """Private memory that holds one tensor of ``used`` bytes."""

    address: int
    size: int
    used: int


_known: dict[int, _Mapping] = {}
"""The process's mappings by the address of the tensor's first byte."""


def give_own_pages(modules: Iterable[nn.Module]) -> None:
    """Move every large CPU parameter and buffer into pages of its own, where the kernel can swap pages."""
    if not can_swap():
        return
    moved: dict[tuple[object, ...], torch.Tensor] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            old = tensor.data
            large = type(old) is torch.Tensor and old.device.type == "cpu" and old.nbytes >= MIN_BYTES
            if large and is_dense(old) and not owns_pages(old):
                key = (old.data_ptr(), old.dtype, old.shape, old.stride())
                if key not in moved:
                    moved[key] = aligned_like(old, old.data_ptr() % ALIGNMENT).copy_(old)
                tensor.data = moved[key]


def aligned_like(like: torch.Tensor, offset: int) -> torch.Tensor:
    """New CPU memory for a tensor like ``like``, ``offset`` bytes behind an aligned address.

    It owns its pages where it is large.
    """
    if like.nbytes >= MIN_BYTES and can_swap():
        return view_as(allocate_pages(like.nbytes, offset), like)
    raw = torch.empty(like.nbytes + 2 * ALIGNMENT, dtype=torch.uint8)
    start = (offset - raw.data_ptr()) % ALIGNMENT
    return view_as(raw[start : start + like.nbytes], like)


def allocate_pages(size: int, offset: int) -> torch.Tensor:
    """``size`` bytes from ``offset`` bytes behind a page's start, in pages of their own. Raises ``OSError``."""
    mapping = _map(-(-(offset + size) // mmap.PAGESIZE) * mmap.PAGESIZE, size)
    memory = (ctypes.c_ubyte * mapping.size).from_address(mapping.address)
    first = mapping.address + offset
    _known[first] = mapping
    weakref.finalize(memory, _unmap, first).atexit = False
    return torch.frombuffer(memory, dtype=torch.uint8)[offset : offset + size]


def owns_pages(tensor: torch.Tensor) -> bool:
    """True if the tensor is all that its pages hold."""
    mapping = _known.get(tensor.data_ptr()) if tensor.device.type == "cpu" and tensor.numel() else None
    return mapping is not None and mapping.used == tensor.nbytes and is_dense(tensor)


def swap_pages(one: torch.Tensor, other: torch.Tensor) -> None:
    """Swap the bytes of two tensors that own their pages and have the same size and offset.

    Raises ``OSError`` where the kernel has no room in its tables; both tensors are then unchanged.
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
def can_swap() -> bool:
    """True if this machine's kernel can swap pages."""
    try:
        one, other = allocate_pages(3, 1).fill_(1), allocate_pages(3, 1).fill_(2)
        swap_pages(one, other)
    except (OSError, AttributeError):  # an older kernel, or not Linux
        return False
    return [*one.tolist(), *other.tolist()] == [2, 2, 2, 1, 1, 1]


def is_dense(tensor: torch.Tensor) -> bool:
    """True if the tensor's bytes have no gaps, in any order of dimensions."""
    return tensor.stride() == _dense_strides(tensor)


def view_as(memory: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """View the bytes ``memory`` as a tensor like ``like``, with its strides where it is dense."""
    return memory.view(like.dtype).as_strided(like.shape, _dense_strides(like))


def _dense_strides(like: torch.Tensor) -> tuple[int, ...]:
    return torch.empty_like(like, device="meta").stride()


def _map(size: int, used: int) -> _Mapping:
    """New memory, aligned for huge pages where it is large. Raises ``OSError``."""
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
        _libc().madvise(address, size, mmap.MADV_HUGEPAGE)  # refused by a kernel without huge pages
    return _Mapping(address, size, used)


def _unmap(first: int) -> None:
    mapping = _known.pop(first)
    _libc().munmap(mapping.address, mapping.size)


def _move(source: int, target: int, size: int) -> None:
    """Move pages and leave empty ones behind. Raises ``OSError``."""
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
