"""Opens the source of an update: for each module, whole tensors by their checkpoint names."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from ....protocol.codec import Buffer
from ....protocol.errors import InvalidRequest, SafelightError
from ....protocol.reports import Invalid, Report
from ....protocol.tensor_sources import Broadcast, CudaShared, Files, Pickled, Sent
from ..checkpoint.copies import Read
from ..checkpoint.mapped_files import MappedFiles
from ..checkpoint.names import Tensors
from ..progress import OnProgress
from .allowlist import NotAPayload
from .cuda_handles import open_handles
from .groups import ProcessGroups
from .payload import InvalidTensor, choose, decode
from .shm_segment import Segments


class Rejected(Exception):
    """The tensors cannot be written. ``report`` lists the invalid ones; ``error`` is the reply to the sender."""

    def __init__(self, error: SafelightError, report: Report) -> None:
        super().__init__(error.message)
        self.error = error
        self.report = report


@dataclass(frozen=True, slots=True)
class RankContext:
    """The rank that opens a source: ``rank`` of ``tp_size`` in its replica, ``global_rank`` of ``world_size`` in all.

    Exactly one replica ``is_primary``: it takes the steps that must happen once.
    """

    rank: int
    tp_size: int
    global_rank: int
    world_size: int
    device: torch.device
    is_primary: bool


class TensorSource:
    """The ``tensors`` of an opened source, until :meth:`close`. ``read`` copies the bytes of mapped files."""

    def __init__(
        self, tensors: Tensors, on_close: Callable[[], object] = lambda: None, read: Read | None = None
    ) -> None:
        self.tensors = tensors
        self.read = read
        self._on_close = on_close

    def close(self) -> None:
        """Release the memory, and delete files that were uploaded for this update."""
        self.tensors = {}
        self._on_close()


def open_source(source: Sent, groups: ProcessGroups, context: RankContext, on_progress: OnProgress) -> TensorSource:
    """Open ``source`` on this rank. Raises ``InvalidRequest`` or ``Rejected``."""
    match source:
        case Files():
            return _open_files(source, context)
        case Broadcast():
            return TensorSource({source.module: groups.receive(source, on_progress)})
        case Pickled():
            return _open_pickled(source, context)
        case CudaShared():
            return _open_cuda_shared(source, context)


def _open_files(source: Files, context: RankContext) -> TensorSource:
    tensors: Tensors = {}
    mapped = MappedFiles()
    deletes = source.delete and context.is_primary and context.rank == 0
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
                        raise InvalidRequest(f"{module}: the files contain {name} twice.")
                    found[name] = tensor
    except BaseException:
        close()
        raise
    return TensorSource(tensors, close, mapped.read)


def _open_pickled(source: Pickled, context: RankContext) -> TensorSource:
    """Map the sender's memory. The first of the ranks that map it also releases it, once all of them have read it."""
    segments = Segments()
    release = ExitStack()
    try:
        payload = choose(source.payloads, context.rank, context.tp_size, source.gpu_uuids, _uuid(context.device))
        if context.is_primary and _is_first(source.payloads, payload, context.rank):
            release.callback(segments.release)
        return TensorSource(decode(bytes(payload), source.targets, segments), release.close)
    except BaseException as error:
        release.close()
        if not isinstance(error, NotAPayload):
            raise
        message = f"The payload cannot be used: {error}."
        faults = [Invalid(error.name, error.reason)] if isinstance(error, InvalidTensor) else []
        raise Rejected(InvalidRequest(message, field="serialized_named_tensors"), Report(invalid=faults)) from None


def _is_first(payloads: Sequence[Buffer], own: Buffer, rank: int) -> bool:
    """True if no lower rank reads the same stream; a sender may list one stream once for each rank."""
    if len(payloads) == 1:
        return rank == 0
    return next(one for one in payloads if bytes(one) == bytes(own)) is own


def _open_cuda_shared(source: CudaShared, context: RankContext) -> TensorSource:
    if len(source.tensors) != context.world_size:
        raise InvalidRequest(
            f"There are {len(source.tensors)} lists of handles; {context.world_size} ranks need one each.",
            field="shared.cuda_ipc",
        )
    try:
        return TensorSource({source.module: open_handles(source.tensors[context.global_rank])})
    except NotAPayload as error:
        raise InvalidRequest(f"The handles cannot be used: {error}.", field="shared.cuda_ipc") from None


def _uuid(device: torch.device) -> str | None:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
