"""The ways by which tensors reach a server: on its own machine a GPU's or shared memory, else its HTTP port."""

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

from ..formats.tensor_files import write_header
from ..protocol.errors import InvalidRequest, Unavailable
from . import weight_calls
from .calls import Call
from .cuda_handles import gpu_of, handle
from .host_tensors import HostTensor

RouteName = Literal["ipc", "shared", "http"]

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


@dataclass(frozen=True, slots=True)
class Server:
    """Its shared-memory directory, wherever that is; the UUIDs of its GPUs; and the number of all of its ranks."""

    shared: Path
    gpus: frozenset[str]
    ranks: int


@contextmanager
def open_route(server: Server, wanted: RouteName | None) -> Iterator[Route]:
    """The route ``wanted``, else the best.

    What was put into shared memory is gone after the context. Raises ``InvalidRequest`` where the wanted one cannot be
    taken.
    """
    folder = None if wanted == "http" else _own_folder(server.shared)
    if wanted in ("ipc", "shared") and folder is None:
        raise InvalidRequest(
            f"{server.shared}, the server's shared memory, is not there for this program: send over http."
        )
    try:
        yield _route(server, wanted, folder)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _route(server: Server, wanted: RouteName | None, folder: Path | None) -> Route:
    if folder is None:
        return Http()
    shared = SharedMemory(folder)
    if wanted == "shared" or not (server.gpus or wanted == "ipc"):
        return shared
    return CudaIpc(server, None if wanted == "ipc" else shared)


def _own_folder(shared: Path) -> Path | None:
    """A new folder in ``shared``, if the server runs on this machine and as the same user."""
    try:
        if shared.stat().st_uid != os.geteuid():
            return None
        return Path(tempfile.mkdtemp(prefix="client-", dir=shared))
    except OSError:
        return None


class CudaIpc:
    """Handles of tensors that are on a GPU of the server's; other parcels go ``otherwise``, where that is given."""

    def __init__(self, server: Server, otherwise: Route | None) -> None:
        self._server = server
        self._otherwise = otherwise

    def pack(self, tensors: Sequence[HostTensor], fields: Mapping[str, Any], tell: Tell) -> Parcel:
        """Raises ``InvalidRequest`` for tensors that have no handle there, unless they go otherwise."""
        there = {
            tensor.name: tensor.held
            for tensor in tensors
            if tensor.nbytes and not isinstance(tensor.held, memoryview)  # torch makes no handle of nothing
        }
        if len(there) == len(tensors) and all(gpu_of(tensor) in self._server.gpus for tensor in there.values()):
            tell(sum(tensor.nbytes for tensor in tensors))
            handles = [[handle(*named) for named in there.items()] for _ in range(self._server.ranks)]
            return Parcel(weight_calls.update_by_handles(handles, fields), there.clear)
        if self._otherwise is None:
            raise InvalidRequest(
                "Tensors that are not on one of the server's GPUs have no handle: send by another route."
            )
        return self._otherwise.pack(tensors, fields, tell)


class SharedMemory:
    """A file for each parcel, in ``folder`` within the server's shared memory; one that was released is written again.

    New memory costs several times what the copy into it does.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = count(1)
        self._free: list[Path] = []

    def pack(self, tensors: Sequence[HostTensor], fields: Mapping[str, Any], tell: Tell) -> Parcel:
        """Raises ``Unavailable`` where there is no room."""
        path = self._free.pop() if self._free else self._folder / f"{next(self._numbers)}.safetensors"
        written = 0
        try:
            with open(path, "r+b" if path.exists() else "xb") as file:
                file.write(_header(tensors))
                for tensor in tensors:
                    file.write(tensor.data)
                    written += tensor.nbytes
                    tell(written)
                file.truncate()
        except OSError as error:
            told = f"{self._folder.parent} cannot take {sum(tensor.nbytes for tensor in tensors)} bytes"
            raise Unavailable(f"{told} ({error.strerror}): make buckets smaller, or /dev/shm larger.") from error
        return Parcel(weight_calls.update_by_file(path, fields), partial(self._free.append, path))


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
