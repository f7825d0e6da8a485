"""Whole tensors of a model, written as safetensors files by the ranks that hold their parts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ....formats.tensor_files import write_header
from ...parallel.ranks import Ranks
from ..checkpoint.layout import Layout
from ..progress import Sign
from ..transport.sources import DTYPES
from .digests import raw_bytes

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


_SYNCED = 256 << 20


@dataclass(frozen=True, slots=True)
class Exported:
    """A file, and on rank 0 the SHA-256 of its bytes."""

    path: str
    sha256: str


def export(
    layouts: Mapping[str, Layout],
    modules: Sequence[str],
    folder: Path,
    ranks: Ranks,
    sign: Sign,
    *,
    durable: bool = False,
) -> dict[str, Exported]:
    """A file for each module in ``folder``, which rank 0 makes; ``durable`` ones are on the disk when it returns.

    All ranks must call this together. Raises ``OSError`` on rank 0, when the others are
    done too.
    """
    written: dict[str, Exported] = {}
    fault: OSError | None = None
    for module in modules:
        layout = layouts[module]
        file = folder / f"{module}.safetensors"
        header = write_header([(entry.name, _NAMES[layout.dtype(entry.name)], entry.shape) for entry in layout])
        parts = (raw_bytes(whole) for _, whole in layout.tensors())
        digest = hashlib.sha256(header)
        if ranks.rank == 0 and fault is None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with file.open("xb") as stream:
                    stream.write(header)
                    unsynced = 0
                    for part in parts:
                        stream.write(part)
                        digest.update(part)
                        unsynced += len(part)
                        if durable and unsynced > _SYNCED:  # now and then, so that no wait for the disk is long
                            os.fdatasync(stream.fileno())
                            unsynced = 0
                        sign()
                    if durable:
                        stream.flush()
                        os.fsync(stream.fileno())
            except OSError as error:
                fault = error
        for _ in parts:  # the gathering takes every rank, to the end
            sign()
        written[module] = Exported(str(file), digest.hexdigest())
    if fault is not None:
        raise fault
    return written
