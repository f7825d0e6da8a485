"""Maps another process's shared-memory segments with tensors: torch's ``file_system`` sharing strategy.

A segment is a file in /dev/shm: a header of 64 bytes, whose first four count the owners, and then the data
(ATen/MapAllocator.cpp). The sender counts itself and one reader for each stream that names the segment; the process
that removes the last owner deletes the file. torch does not map it here, because torch aborts the process if the
sender's segment manager dies or removes the segment too early, and because that manager keeps the memory of a sender
that has exited.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_NAME = re.compile(rb"/torch_[0-9]{1,10}_[0-9]{1,10}_[0-9]{1,20}")
_FOLDER = Path("/dev/shm")
_HEADER = 64

_decrement = ctypes.CDLL(None).sem_trywait  # atomic; a semaphore's first word is its count


class BadSegment(Exception):
    """A segment contradicts the stream that names it."""


class Segments:
    """The segments that one stream names, mapped until their storages are freed."""

    def __init__(self) -> None:
        self._owned: list[tuple[str, mmap.mmap]] = []

    def map(self, name: bytes, nbytes: int) -> torch.UntypedStorage:
        """The segment's ``nbytes`` of data. Raises :class:`BadSegment`."""
        with _opened(name, nbytes) as descriptor:
            try:
                mapping = mmap.mmap(descriptor, _HEADER + nbytes)
            except (OSError, ValueError) as error:
                raise BadSegment(f"the segment {name.decode()} cannot be mapped: {error}") from error
        if ctypes.c_int32.from_buffer(mapping).value < 1:
            raise BadSegment(f"the segment {name.decode()} has no owner")
        self._owned.append((name[1:].decode(), mapping))
        if nbytes == 0:
            return torch.empty(0).untyped_storage()
        return torch.frombuffer(mapping, dtype=torch.uint8, offset=_HEADER).untyped_storage()

    def release(self) -> None:
        """Remove this reader from the owners of each segment; the last owner deletes the file."""
        for name, mapping in self._owned:
            owners = ctypes.c_int32.from_buffer(mapping)
            last = owners.value == 1
            _decrement(ctypes.byref(owners))
            if last:
                (_FOLDER / name).unlink(missing_ok=True)
        self._owned.clear()


def check_segment(name: bytes, nbytes: int) -> None:
    """Raise :class:`BadSegment` unless this user has such a segment with ``nbytes`` of data."""
    with _opened(name, nbytes):
        pass


@contextmanager
def _opened(name: bytes, nbytes: int) -> Iterator[int]:
    if not _NAME.fullmatch(name):
        raise BadSegment("a segment's name is not one of torch's")
    segment = f"the segment {name.decode()}"
    try:
        descriptor = os.open(_FOLDER / name[1:].decode(), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise BadSegment(f"{segment} cannot be opened: {error.strerror}") from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise BadSegment(f"{segment} is not a regular file of this user")
        if found.st_size != _HEADER + nbytes:
            raise BadSegment(f"{segment} has {found.st_size - _HEADER} bytes of data, not {nbytes}")
        yield descriptor
    finally:
        os.close(descriptor)
