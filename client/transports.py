"""Transports of tensors to a server: CUDA IPC or shared memory on its own machine, else HTTP."""

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
from .results import WeightUpdate

TransportName = Literal["ipc", "shared", "http"]

CHUNK = 1 << 20
"""Bytes per chunk of an HTTP body; httpx copies each chunk."""

OnSent = Callable[[int], object]
"""Called with the bytes of a bucket's tensors that were sent so far."""


@dataclass(frozen=True, slots=True)
class EncodedBucket:
    """Tensors ready to send: ``call`` sends them, and ``release`` frees their memory or file afterwards."""

    call: Call[WeightUpdate]
    release: Callable[[], object]


class Transport(Protocol):
    def encode(self, tensors: Sequence[HostTensor], fields: Mapping[str, Any], on_sent: OnSent) -> EncodedBucket:
        """Encode ``tensors`` for a call that has the update's ``fields``."""


@dataclass(frozen=True, slots=True)
class Server:
    """The server's shared-memory directory (on its own machine), the UUIDs of its GPUs, and its ranks in total."""

    shared: Path
    gpus: frozenset[str]
    ranks: int


@contextmanager
def open_transport(server: Server, wanted: TransportName | None) -> Iterator[Transport]:
    """Open the transport ``wanted``, by default the fastest available; files in shared memory are removed on exit.

    Raises ``InvalidRequest`` where the wanted transport is not available.
    """
    folder = None if wanted == "http" else _own_folder(server.shared)
    if wanted in ("ipc", "shared") and folder is None:
        raise InvalidRequest(
            f"{server.shared}, the server's shared memory, is not accessible to this program: use route http."
        )
    try:
        yield _transport(server, wanted, folder)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _transport(server: Server, wanted: TransportName | None, folder: Path | None) -> Transport:
    if folder is None:
        return Http()
    shared = SharedMemory(folder)
    if wanted == "shared" or not (server.gpus or wanted == "ipc"):
        return shared
    return CudaIpc(server, None if wanted == "ipc" else shared)


def _own_folder(shared: Path) -> Path | None:
    """Create a folder in ``shared``; ``None`` unless the server runs on this machine as the same user."""
    try:
        if shared.stat().st_uid != os.geteuid():
            return None
        return Path(tempfile.mkdtemp(prefix="client-", dir=shared))
    except OSError:
        return None


class CudaIpc:
    """CUDA IPC handles of tensors on one of the server's GPUs; other buckets use ``fallback``, if there is one."""

    def __init__(self, server: Server, fallback: Transport | None) -> None:
        self._server = server
        self._fallback = fallback

    def encode(self, tensors: Sequence[HostTensor], fields: Mapping[str, Any], on_sent: OnSent) -> EncodedBucket:
        """Raises ``InvalidRequest`` for tensors without a handle on the server's GPUs, if there is no fallback."""
        there = {
            tensor.name: tensor.held
            for tensor in tensors
            if tensor.nbytes and not isinstance(tensor.held, memoryview)  # torch has no handles for empty tensors
        }
        if len(there) == len(tensors) and all(gpu_of(tensor) in self._server.gpus for tensor in there.values()):
            on_sent(sum(tensor.nbytes for tensor in tensors))
            handles = [[handle(*named) for named in there.items()] for _ in range(self._server.ranks)]
            return EncodedBucket(weight_calls.update_by_handles(handles, fields), there.clear)
        if self._fallback is None:
            raise InvalidRequest("Tensors that are not on one of the server's GPUs have no handle: use another route.")
        return self._fallback.encode(tensors, fields, on_sent)


class SharedMemory:
    """A file per bucket, in ``folder`` of the server's shared memory.

    Released files are reused: to allocate new shared memory takes several times as long as the copy into it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = count(1)
        self._free: list[Path] = []

    def encode(self, tensors: Sequence[HostTensor], fields: Mapping[str, Any], on_sent: OnSent) -> EncodedBucket:
        """Raises ``Unavailable`` where shared memory is full."""
        path = self._free.pop() if self._free else self._folder / f"{next(self._numbers)}.safetensors"
        written = 0
        try:
            with open(path, "r+b" if path.exists() else "xb") as file:
                file.write(_header(tensors))
                for tensor in tensors:
                    file.write(tensor.data)
                    written += tensor.nbytes
                    on_sent(written)
                file.truncate()
        except OSError as error:
            refused = f"{self._folder.parent} cannot take {sum(tensor.nbytes for tensor in tensors)} bytes"
            raise Unavailable(f"{refused} ({error.strerror}): make buckets smaller, or /dev/shm larger.") from error
        return EncodedBucket(weight_calls.update_by_file(path, fields), partial(self._free.append, path))


class Http:
    """An HTTP body per bucket, generated while it is sent."""

    def encode(self, tensors: Sequence[HostTensor], fields: Mapping[str, Any], on_sent: OnSent) -> EncodedBucket:
        header = _header(tensors)
        size = len(header) + sum(tensor.nbytes for tensor in tensors)

        def chunks() -> Iterable[bytes]:
            yield header
            sent = 0
            for tensor in tensors:
                for start in range(0, tensor.nbytes, CHUNK):
                    yield bytes(tensor.data[start : start + CHUNK])
                    on_sent(sent + min(start + CHUNK, tensor.nbytes))
                sent += tensor.nbytes

        return EncodedBucket(weight_calls.update_by_body(chunks, size, fields), lambda: None)


def _header(tensors: Sequence[HostTensor]) -> bytes:
    return write_header([(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors])
