"""Where an update's tensors come from, as one thing: for each module, whole tensors by their checkpoint names."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import stat
import warnings
from bisect import bisect_right, insort
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import torch

from ....formats.digests import TORCH_DTYPES
from ....formats.tensor_files import BadTensorFile, StoredTensor, read_head, stamp
from ....protocol.codec import Buffer
from ....protocol.errors import InvalidRequest, SafelightError
from ....protocol.reports import Invalid, Report
from ....protocol.tensor_sources import Broadcast, CudaShared, Files, Pickled, Source
from ..checkpoint.overwrite import Read
from ..progress import Sign
from .allowlist import NotAPayload
from .cuda_handles import open_handles
from .groups import Groups
from .payload import InvalidTensor, Tensors, choose, decode
from .shm_segment import Segments

DTYPES: dict[str, torch.dtype] = {
    stored: getattr(torch, told.removeprefix("torch.")) for stored, told in TORCH_DTYPES.items()
}
"""By safetensors' names."""


class Rejected(Exception):
    """The tensors cannot be written. ``report`` says which and why, and ``error`` is what the sender is told."""

    def __init__(self, error: SafelightError, report: Report) -> None:
        super().__init__(error.message)
        self.error = error
        self.report = report


@dataclass(frozen=True, slots=True)
class Reader:
    """Who opens a source: a ``rank`` of a replica of ``ranks``; one replica ``leads``, and does what is done once.

    ``place`` is its number among ``places``, all ranks of all replicas.
    """

    rank: int
    ranks: int
    place: int
    places: int
    device: torch.device
    leads: bool


class Opened:
    """A source's ``tensors``, until :meth:`close`; ``read`` reads what is mapped."""

    def __init__(self, tensors: Tensors, then: Callable[[], object] = lambda: None, read: Read | None = None) -> None:
        self.tensors = tensors
        self.read = read
        self._then = then

    def close(self) -> None:
        """Let go of the memory; files that were sent for this update alone are gone."""
        self.tensors = {}
        self._then()


def open_source(source: Source, groups: Groups, reader: Reader, sign: Sign) -> Opened:
    """Every tensor that ``source`` has for this rank. Raises ``InvalidRequest`` or ``Rejected``, in words for who sent
    it."""
    match source:
        case Files():
            return _files(source, reader)
        case Broadcast():
            return Opened({source.module: groups.receive(source, sign)})
        case Pickled():
            return _pickled(source, reader)
        case CudaShared():
            return _cuda_shared(source, reader)


def _files(source: Files, reader: Reader) -> Opened:
    tensors: Tensors = {}
    mapped = MappedFiles()
    deletes = source.delete and reader.leads and reader.rank == 0
    folders = {Path(file).parent for files in source.modules.values() for file in files} if deletes else set()

    def close() -> None:
        mapped.close()
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    try:
        for module, files in source.modules.items():
            found = tensors.setdefault(module, {})
            for file in files:
                for name, tensor in mapped.map(Path(file), source.stamps.get(file)).items():
                    if name in found and not source.overlay:
                        raise InvalidRequest(f"{module}: the files have {name} twice.")
                    found[name] = tensor
    except BaseException:
        close()
        raise
    return Opened(tensors, close, mapped.read)


def _pickled(source: Pickled, reader: Reader) -> Opened:
    """The sender's memory, mapped. Only one of its readers gives it up, when the others have read it too."""
    segments = Segments()
    last = ExitStack()
    try:
        payload = choose(source.payloads, reader.rank, reader.ranks, source.gpu_uuids, _uuid(reader.device))
        if reader.leads and _is_first(source.payloads, payload, reader.rank):
            last.callback(segments.release)
        return Opened(decode(bytes(payload), source.targets, segments), last.close)
    except BaseException as error:
        last.close()
        if not isinstance(error, NotAPayload):
            raise
        message = f"The payload cannot be used: {error}."
        faults = [Invalid(error.name, error.reason)] if isinstance(error, InvalidTensor) else []
        raise Rejected(InvalidRequest(message, field="serialized_named_tensors"), Report(invalid=faults)) from None


def _is_first(payloads: Sequence[Buffer], own: Buffer, rank: int) -> bool:
    """Whether no rank before reads the same stream, which a sender may have made once and listed for each."""
    if len(payloads) == 1:
        return rank == 0
    return next(one for one in payloads if bytes(one) == bytes(own)) is own


def _cuda_shared(source: CudaShared, reader: Reader) -> Opened:
    if len(source.tensors) != reader.places:
        raise InvalidRequest(
            f"There are {len(source.tensors)} lists of handles; {reader.places} ranks need one each.",
            field="shared.cuda_ipc",
        )
    try:
        return Opened({source.module: open_handles(source.tensors[reader.place])})
    except NotAPayload as error:
        raise InvalidRequest(f"The handles cannot be used: {error}.", field="shared.cuda_ipc") from None


def _uuid(device: torch.device) -> str | None:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


class MappedFiles:
    """safetensors files in mapped memory.

    Until :meth:`close` their bytes can also be read, which is cheaper where all of them are wanted: a page that is
    mapped is entered into tables first.
    """

    def __init__(self) -> None:
        self._open = ExitStack()
        self._starts: list[tuple[int, int]] = []  # where in memory each begins, in that order, and its descriptor

    def map(self, path: Path, known: list[int] | None = None) -> dict[str, torch.Tensor]:
        """The tensors of a file, which must be the one ``known`` by that stamp. Raises ``InvalidRequest``."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # which waits for nobody's other end
            stream = self._open.enter_context(os.fdopen(descriptor, "rb", buffering=0))
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise BadTensorFile("it is no file")
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
    """The tensors of a safetensors file, in the memory that the file is mapped to. Raises ``InvalidRequest``."""
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
