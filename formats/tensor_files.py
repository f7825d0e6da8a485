"""Read and write the headers of safetensors files, and map their tensors.

A file has 8 bytes with the header's length, the header as JSON, and the tensors' bytes
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

MAX_HEADER = 100_000_000
"""The format's own limit, in bytes."""

MAX_NAME = 1000
"""The limit of characters in a tensor's name."""

_LIMIT = 1 << 48  # for sizes, offsets and numbers of elements
_SHOWN = 100  # characters of a file's text in a message

ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes per element, by the format's name of the dtype."""


class BadTensorFile(ValueError):
    """The file is not a safetensors file, or is incomplete; the message gives the reason without the file's name."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: ``nbytes`` bytes from offset ``start``, row-major and little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(head: bytes, size: int) -> list[StoredTensor]:
    """Parse the tensors, sorted by offset, from the first bytes ``head`` of a file of ``size`` bytes.

    Raises ``BadTensorFile`` if the header is incomplete, tensors overlap or leave gaps, or the header does not match
    the file's size.
    """
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER) or len(head) < 8 + length:
        raise BadTensorFile("its header is missing")
    try:
        described = json.loads(head[8 : 8 + length])
        found = [_stored(name, entry, 8 + length) for name, entry in described.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise error if isinstance(error, BadTensorFile) else BadTensorFile("its header cannot be read") from None
    found.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    end = 8 + length
    for tensor in found:
        if tensor.start != end:
            raise BadTensorFile(f"its tensor {tensor.name} begins at byte {tensor.start}, not {end}")
        end += tensor.nbytes
    if end != size:
        raise BadTensorFile(f"its header describes {end} bytes and it has {size}")
    return found


def read_head(stream: BinaryIO, size: int) -> list[StoredTensor]:
    """:func:`read_header` for a ``stream`` at the beginning of a file of ``size`` bytes."""
    start = stream.read(8)
    length = int.from_bytes(start, "little")
    return read_header(start + stream.read(length) if length <= MAX_HEADER else start, size)


def read_metadata(stream: BinaryIO, size: int) -> dict[str, str]:
    """Read ``__metadata__`` from a ``stream`` at the beginning of a file of ``size`` bytes.

    Raises ``BadTensorFile`` for an unreadable header, and for metadata whose values are not strings.
    """
    length = int.from_bytes(stream.read(8), "little")
    try:
        found = json.loads(stream.read(length) if length <= min(size, MAX_HEADER) else b"").get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError):
        raise BadTensorFile("its header cannot be read") from None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise BadTensorFile("its metadata is not a map of strings")
    return found


def write_header(tensors: Sequence[tuple[str, str, Sequence[int]]]) -> bytes:
    """The header of a file with tensors of these names, dtypes (the format's names) and shapes, in this order."""
    described: dict[str, Any] = {}
    start = 0
    for name, dtype, shape in tensors:
        end = start + math.prod(shape) * ITEM_SIZES[dtype]
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # align the first tensor
    return len(header).to_bytes(8, "little") + header


def _stored(name: str, entry: Any, base: int) -> StoredTensor:
    shown = f"its tensor {name[:_SHOWN]!r}"
    begin, end = entry["data_offsets"]
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if len(name) > MAX_NAME or not name.isprintable():
        raise BadTensorFile(f"the name of {shown} is too long, or not printable")
    if not is_shape(shape) or not all(type(number) is int and 0 <= number <= _LIMIT for number in (begin, end)):
        raise BadTensorFile(f"the shape or the offsets of {shown} are not integers from 0 to 2**48")
    if dtype not in ITEM_SIZES or end - begin != math.prod(shape) * ITEM_SIZES[dtype]:
        raise BadTensorFile(f"the size of {shown} is not that of {str(dtype)[:_SHOWN]} {list(shape)}")
    return StoredTensor(name, dtype, shape, base + begin, end - begin)


def is_shape(numbers: Sequence[object]) -> bool:
    """Accept at most 64 ints of 0 or more, whose product without zeros is at most 2**48."""
    return (
        len(numbers) <= 64
        and all(type(number) is int and 0 <= number <= _LIMIT for number in numbers)
        and math.prod(number or 1 for number in numbers if isinstance(number, int)) <= _LIMIT
    )


class TensorFile(Mapping[str, StoredTensor]):
    """A context that maps a file: its tensors by name, and their bytes without a copy.

    On entry it raises ``BadTensorFile``, or ``OSError`` if the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors: dict[str, StoredTensor] = {}

    def __enter__(self) -> Self:
        with self._path.open("rb") as stream:
            self._tensors = {tensor.name: tensor for tensor in read_head(stream, os.fstat(stream.fileno()).st_size)}
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = memoryview(self._map)
        return self

    def __exit__(self, *_: object) -> None:
        self._bytes.release()
        self._map.close()

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def data(self, name: str) -> memoryview:
        """The tensor's bytes; release the view before the context ends."""
        tensor = self._tensors[name]
        return self._bytes[tensor.start : tensor.start + tensor.nbytes]


def stamp(found: os.stat_result) -> list[int]:
    """The identity of a file and its content: with another stamp, the bytes may have changed."""
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


STEMS = ("diffusion_pytorch_model", "model")
"""Stems of weight files: diffusers', then transformers'."""


def weight_files(folder: Path, variant: str | None = None, stems: Sequence[str] = STEMS) -> list[Path]:
    """The safetensors files that a component's library loads: those of ``variant``, or those without a variant.

    The list may be empty. Raises ``BadTensorFile`` for an index that is unreadable or names a missing file.
    """
    for stem in stems:
        single = folder / f"{stem}.{f'{variant}.' if variant else ''}safetensors"
        indices = [index for index in _indices(folder, stem, variant) if index.is_file()]
        # if there is an index beside the file, diffusers loads the index and transformers the file
        if single.is_file() and not (indices and stem == STEMS[0]):
            return [single]
        if indices:
            return _indexed(indices[0])
    return []


def _indices(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """Possible names of an index; older releases of diffusers wrote the second one for a variant."""
    if variant is None:
        return [folder / f"{stem}.safetensors.index.json"]
    return [folder / f"{stem}.safetensors.{end}.json" for end in (f"index.{variant}", f"{variant}.index")]


def _indexed(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BadTensorFile(f"{index.name} has no weight_map") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (index.parent / name).is_file():
            raise BadTensorFile(f"{index.name} names the missing file {name!r}")
    return [index.parent / name for name in sorted(names)]
