"""The ways by which tensors reach a server: its shared memory, where it is on this machine, or its HTTP port."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, Protocol

from ..protocol.errors import InvalidRequest, Unavailable
from ..protocol.tensor_files import write_header
from . import weight_calls
from .calls import Call
from .host_tensors import HostTensor

RouteName = Literal["shared", "http"]

CHUNK = 1 << 20
"""Bytes that the HTTP library is given at a time; it copies them."""

Tell = Callable[[int], object]
"""Hears how many bytes of a parcel's tensors are on their way."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """Tensors that are ready: ``call`` sends them, and ``release`` lets go of what was kept for it."""

    call: Call
    release: Callable[[], object]


class Route(Protocol):
    def pack(self, tensors: Sequence[HostTensor], fields: Mapping[str, Any], tell: Tell) -> Parcel:
        """Make a parcel of ``tensors``; ``fields`` are those of the update."""


@contextmanager
def open_route(shared: Path, wanted: RouteName | None) -> Iterator[Route]:
    """The route ``wanted``, else the best. ``shared`` is the server's shared-memory directory, wherever that is.

    What was put there is gone after the context. Raises ``InvalidRequest`` where the wanted one cannot be taken.
    """
    folder = None if wanted == "http" else _own_folder(shared)
    if wanted == "shared" and folder is None:
        raise InvalidRequest(f"{shared}, the server's shared memory, is not there for this program: send over http.")
    try:
        yield Http() if folder is None else SharedMemory(folder)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _own_folder(shared: Path) -> Path | None:
    """A new folder in ``shared``, if the server runs on this machine and as the same user."""
    try:
        if shared.stat().st_uid != os.geteuid():
            return None
        return Path(tempfile.mkdtemp(prefix="client-", dir=shared))
    except OSError:
        return None


class SharedMemory:
    """A file for each parcel, in ``folder`` within the server's shared memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = count(1)

    def pack(self, tensors: Sequence[HostTensor], fields: Mapping[str, Any], tell: Tell) -> Parcel:
        """Raises ``Unavailable`` where there is no room."""
        path = self._folder / f"{next(self._numbers)}.safetensors"
        written = 0
        try:
            with path.open("xb") as file:
                file.write(_header(tensors))
                for tensor in tensors:
                    file.write(tensor.data)
                    written += tensor.nbytes
                    tell(written)
        except OSError as error:
            told = f"{self._folder.parent} cannot take {sum(tensor.nbytes for tensor in tensors)} bytes"
            raise Unavailable(f"{told} ({error.strerror}): make buckets smaller, or /dev/shm larger.") from error
        return Parcel(weight_calls.update_by_file(path, fields), partial(path.unlink, missing_ok=True))


class Http:
    """A body for each parcel, made while it is sent."""

    def pack(self, tensors: Sequence[HostTensor], fields: Mapping[str, Any], tell: Tell) -> Parcel:
        header = _header(tensors)
        size = len(header) + sum(tensor.nbytes for tensor in tensors)

        def chunks() -> Iterable[bytes]:
            yield header
            sent = 0
            for tensor in tensors:
                for start in range(0, tensor.nbytes, CHUNK):
                    yield bytes(tensor.data[start : start + CHUNK])
                    tell(sent + min(start + CHUNK, tensor.nbytes))
                sent += tensor.nbytes

        return Parcel(weight_calls.update_by_body(chunks, size, fields), lambda: None)


def _header(tensors: Sequence[HostTensor]) -> bytes:
    return write_header([(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors])
