"""The server's heap: it gives the memory of large bodies back to the system."""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's numbers of the settings (``malloc.h``)."""

_LARGE = 2**20 + 2**12
"""Bytes of a block that is mapped by itself. A part of a reply (1 MiB) is smaller."""

_KEPT = 8 * 2**20
"""Bytes at the heap's end that stay, so that reading from sockets does not move the end each time."""


def give_back_large_blocks() -> None:
    """Have each block of more than a megabyte mapped by itself, unless the environment sets the thresholds.

    glibc's own threshold grows to the largest block that was freed: after a body of 30 MB, all that are smaller come
    from the heap, where any small object behind them keeps their memory. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc" or {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, _LARGE)
    libc.mallopt(_TRIM_THRESHOLD, _KEPT)
