"""Tensors to send, in host memory or on a GPU. Torch is needed only for casts."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..formats.digests import STORED_DTYPES, TORCH_DTYPES, tensor_digest
from ..formats.tensor_files import ITEM_SIZES, BadTensorFile, read_head
from ..protocol.errors import InvalidRequest

if TYPE_CHECKING:
    import torch

_FLOATING = frozenset({"F8_E5M2", "F8_E4M3", "F16", "BF16", "F32", "F64"})


@dataclass(frozen=True)
class HostTensor:
    """``held`` has the bytes, row-major and little-endian, or a GPU tensor; ``dtype`` is named as in safetensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    held: memoryview | torch.Tensor

    @cached_property
    def data(self) -> memoryview:
        """The bytes; those of a GPU tensor are copied on first use."""
        return self.held if isinstance(self.held, memoryview) else _bytes(self.held)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]

    def digest(self) -> str:
        return tensor_digest(TORCH_DTYPES[self.dtype], self.shape, self.data)

    def cast(self, dtype: str) -> HostTensor:
        """Cast to a parameter's ``dtype``; unless both dtypes are floating, return the tensor unchanged."""
        if dtype == self.dtype or not {dtype, self.dtype} <= _FLOATING:
            return self
        import torch

        if not self.data:
            return HostTensor(self.name, dtype, self.shape, self.data)
        data = bytearray(self.data) if self.data.readonly else self.data  # frombuffer warns about read-only memory
        tensor = torch.frombuffer(data, dtype=_torch_dtype(self.dtype)).view(self.shape)
        return from_torch(self.name, tensor.to(_torch_dtype(dtype)))


def from_torch(name: str, tensor: torch.Tensor) -> HostTensor:
    """Wrap ``tensor``, without a copy if it is contiguous. Raises ``InvalidRequest``."""
    import torch

    dtype = STORED_DTYPES.get(str(tensor.dtype))
    if dtype is None or tensor.layout is not torch.strided:
        raise InvalidRequest(f"{name} is a {tensor.layout} tensor of {tensor.dtype}, which safetensors cannot store.")
    held = tensor.detach().contiguous()
    return HostTensor(name, dtype, tuple(tensor.shape), held if held.is_cuda else _bytes(held))


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # a buffer


def from_files(files: Iterable[Path]) -> Iterator[HostTensor]:
    """Yield every tensor of the files, memory-mapped. Raises ``InvalidRequest``."""
    for path in files:
        try:
            with path.open("rb") as stream:
                stored = read_head(stream, path.stat().st_size)
                mapped = memoryview(
                    mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
                )  # lives as long as its views
        except (BadTensorFile, OSError) as error:
            raise InvalidRequest(f"{path} cannot be read: {error}.") from None
        for tensor in stored:
            data = mapped[tensor.start : tensor.start + tensor.nbytes]
            yield HostTensor(tensor.name, tensor.dtype, tensor.shape, data)


def _torch_dtype(stored: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_DTYPES[stored].removeprefix("torch."))
    return dtype
