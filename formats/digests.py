"""SHA-256 digests of weights, equal for a running server and for files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TypeAlias

Bytes: TypeAlias = "bytes | memoryview"

TORCH_DTYPES = {
    "BOOL": "torch.bool", "U8": "torch.uint8", "I8": "torch.int8", "U16": "torch.uint16", "I16": "torch.int16",
    "U32": "torch.uint32", "I32": "torch.int32", "U64": "torch.uint64", "I64": "torch.int64", "F16": "torch.float16",
    "BF16": "torch.bfloat16", "F32": "torch.float32", "F64": "torch.float64", "C64": "torch.complex64",
    "F8_E5M2": "torch.float8_e5m2", "F8_E4M3": "torch.float8_e4m3fn",
}  # fmt: skip
"""torch's names of dtypes, by those of safetensors."""

STORED_DTYPES = {torch_name: stored for stored, torch_name in TORCH_DTYPES.items()}
"""The names of dtypes in safetensors, by torch's."""


def tensor_digest(dtype: str, shape: Sequence[int], data: Bytes) -> str:
    """Hex digest of the dtype (torch's name), the shape (as a Python tuple) and the bytes of the full tensor."""
    digest = hashlib.sha256(dtype.encode() + repr(tuple(shape)).encode())
    digest.update(data)
    return digest.hexdigest()


def module_digest(tensors: Iterable[tuple[str, Bytes]]) -> str:
    """Hex digest of every name and its bytes; ``tensors`` must be sorted by name."""
    digest, last = hashlib.sha256(), None
    for name, data in tensors:
        assert last is None or last < name, "sorted by name"
        digest.update(name.encode())
        digest.update(data)
        last = name
    return digest.hexdigest()
