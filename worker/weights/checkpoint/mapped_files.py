"""safetensors files in mapped memory: their tensors are views, and nothing is read before it is used."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import warnings
from bisect import bisect_right, insort
from contextlib import ExitStack
from operator import itemgetter
from pathlib import Path

import torch

from ....formats.digests import TORCH_DTYPES
from ....formats.tensor_files import BadTensorFile, StoredTensor, read_head, stamp
from ....protocol.errors import InvalidRequest

DTYPES: dict[str, torch.dtype] = {
    stored: getattr(torch, name.removeprefix("torch.")) for stored, name in TORCH_DTYPES.items()
}
"""torch's dtypes by safetensors' names."""


class MappedFiles:
    """safetensors files in mapped memory.

    Until :meth:`close`, :meth:`read` copies their bytes without touching the mapping. That is cheaper when all bytes
    are needed, because it avoids a page fault for each page.
    """

    def __init__(self) -> None:
        self._open = ExitStack()
        self._starts: list[tuple[int, int]] = []  # (address, file descriptor), by address

    def map(self, path: Path, known: list[int] | None = None) -> dict[str, torch.Tensor]:
        """The tensors of the file at ``path``. Raises ``InvalidRequest``, also where its stamp is not ``known``."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # do not wait for the writer of a FIFO
            stream = self._open.enter_context(os.fdopen(descriptor, "rb", buffering=0))
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise BadTensorFile("it is not a regular file")
            if known is not None and stamp(found) != known:
                raise BadTensorFile("it has changed since it was named")
            stored = read_head(stream, found.st_size)
            mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        except (OSError, BadTensorFile) as error:
            raise InvalidRequest(f"The file {path.name} cannot be used: {error}.") from None
        start = _frombuffer(mapped, torch.uint8, len(mapped), 0).data_ptr()
        insort(self._starts, (start, descriptor))
        return {tensor.name: _view(mapped, tensor) for tensor in stored}

    def read(self, into: memoryview, address: int) -> None:
        """Fill ``into`` with the bytes that are mapped at ``address``. Raises ``OSError``."""
        start, descriptor = self._starts[bisect_right(self._starts, address, key=itemgetter(0)) - 1]
        offset = address - start
        while into:
            if not (count := os.preadv(descriptor, [into], offset)):
                raise OSError(errno.EIO, "a file has become shorter")
            into, offset = into[count:], offset + count

    def close(self) -> None:
        self._open.close()
        self._starts.clear()


def map_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, as views of its mapping. Raises ``InvalidRequest``."""
    files = MappedFiles()
    try:
        return files.map(path)
    finally:
        files.close()


def _view(mapped: mmap.mmap, stored: StoredTensor) -> torch.Tensor:
    dtype = DTYPES[stored.dtype]
    if not stored.nbytes:
        return torch.empty(stored.shape, dtype=dtype)
    count = stored.nbytes // dtype.itemsize
    return _frombuffer(mapped, dtype, count, stored.start).view(stored.shape)


def _frombuffer(mapped: mmap.mmap, dtype: torch.dtype, count: int, offset: int) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it may not be written to
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset)
