"""Writes whole tensors of a model as safetensors files; the ranks gather the parts that they hold."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ....formats.tensor_files import write_header
from ...parallel.ranks import Ranks
from ..checkpoint.layout import Layout
from ..checkpoint.mapped_files import DTYPES
from ..progress import OnProgress
from .digests import raw_bytes

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_MAX_UNSYNCED = 256 << 20
"""Bytes that may wait for the disk, so that no single wait is long."""


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """A file, and on rank 0 the SHA-256 of its bytes."""

    path: str
    sha256: str


def write_snapshot(
    layouts: Mapping[str, Layout],
    modules: Sequence[str],
    folder: Path,
    ranks: Ranks,
    on_progress: OnProgress,
    *,
    durable: bool = False,
) -> dict[str, SnapshotFile]:
    """Write a file for each module into ``folder``, which rank 0 makes anew; ``durable`` files are on disk afterwards.

    All ranks must call this together. Raises ``OSError`` on rank 0, after the other ranks have finished too, and leaves
    no file.
    """
    written: dict[str, SnapshotFile] = {}
    fault: OSError | None = None
    if ranks.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    for module in modules:
        layout, file = layouts[module], folder / f"{module}.safetensors"
        header = write_header([(entry.name, _NAMES[layout.dtype(entry.name)], entry.shape) for entry in layout])
        parts = (raw_bytes(whole) for _, whole in layout.tensors())
        digest = hashlib.sha256(header)
        if ranks.rank == 0 and fault is None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _write_file(file, header, parts, digest, on_progress, durable=durable)
            except OSError as error:
                fault = error
        for _ in parts:  # every rank must take part in gathering to the end
            on_progress()
        written[module] = SnapshotFile(str(file), digest.hexdigest())
    if fault is not None:
        shutil.rmtree(folder, ignore_errors=True)
        raise fault
    return written


def _write_file(
    file: Path,
    header: bytes,
    parts: Iterable[memoryview],
    digest: hashlib._Hash,
    on_progress: OnProgress,
    *,
    durable: bool,
) -> None:
    unsynced = 0
    with file.open("xb") as stream:
        stream.write(header)
        for part in parts:
            stream.write(part)
            digest.update(part)
            unsynced += len(part)
            if durable and unsynced > _MAX_UNSYNCED:
                os.fdatasync(stream.fileno())
                unsynced = 0
            on_progress()
        if durable:
            stream.flush()
            os.fsync(stream.fileno())
