"""The base of quantized weights: the checkpoint's own values, which updates, digests and snapshots speak of.

It stays in the checkpoint's files, mapped into memory, while nothing is written to it: that costs no memory of its own,
and all replicas share it. A tensor that is written for the first time, and one that is not in a file as it is in the
model (in another precision, or divided in pieces), lies in host memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ....formats.tensor_files import stamp
from ....protocol.errors import Internal
from ..checkpoint.layout import Layout
from ..checkpoint.mapped_files import map_file
from ..update.page_swap import ALIGNMENT, aligned_like
from .layers import QuantizedLayer


class CheckpointFile:
    """A file of the checkpoint, mapped. It must not be written to while it is; a new one may take its place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = path.open("rb", buffering=0)
        self._stamp = stamp(os.fstat(self._stream.fileno()))[:-1]  # but for the change of its links
        self.tensors = map_file(path)

    def check(self) -> None:
        """Raise ``Internal`` if the file was written to."""
        if stamp(os.fstat(self._stream.fileno()))[:-1] != self._stamp:
            raise Internal(
                f"The file {self._path} was overwritten while the server used it: the weights that it quantized are "
                "not there any more. Restart the server, and write checkpoints to new files."
            )


class QuantizedWeight:
    """A tensor of a checkpoint that ``layer`` holds quantized, in its ``rows`` if it is fused with others."""

    def __init__(self, layer: QuantizedLayer, rows: slice | None, base: torch.Tensor) -> None:
        self._layer = layer
        self._rows = slice(None) if rows is None else rows
        self._base = base
        self._file: CheckpointFile | None = None

    @property
    def base(self) -> torch.Tensor:
        """This rank's part of the checkpoint's values. Raises ``Internal`` if their file was overwritten."""
        if self._file is not None:
            self._file.check()
        return self._base

    @property
    def is_in_file(self) -> bool:
        return self._file is not None

    def leave_in_file(self, files: Sequence[CheckpointFile], layout: Layout, name: str) -> None:
        """Take the base from a file that holds the same values."""
        file = next((file for file in files if name in file.tensors), None)
        if file is None or file.tensors[name].shape != layout[name].shape:
            return
        part = layout.part(name, file.tensors[name])
        if part.untyped_storage().data_ptr() == file.tensors[name].untyped_storage().data_ptr() and same(
            part, self._base
        ):
            self._base, self._file = part, file

    def own(self) -> None:
        """Give the base memory of its own, which may be written to."""
        if self._file is not None:
            base = self.base
            self._base, self._file = aligned_like(base, base.data_ptr() % ALIGNMENT).copy_(base), None

    @torch.no_grad()
    def encode(self) -> None:
        """Have the layer compute with the base.

        A GPU without memory for it gets the codes from the host, which are the same: a rollback must not fail here.
        """
        try:
            codes, scale = self._layer.scheme.encode(self._base.to(self._layer.codes.device))
        except torch.OutOfMemoryError:
            codes, scale = self._layer.scheme.encode(self._base)
        self._layer.codes[self._rows].copy_(codes)
        self._layer.scale[self._rows].copy_(scale)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
