"""safetensors files, known by their headers before anything of them is read.

A file is 8 bytes with the header's length, the header as JSON, and the tensors' bytes
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
from types import TracebackType
from typing import Any, BinaryIO, Self

MAX_HEADER = 100_000_000
"""The bound of the format itself."""

MAX_NAME = 1000
"""Characters of a tensor's name."""

_LIMIT = 1 << 48  # of every size and position, and of the number of elements
_SHOWN = 100  # characters of what a file says

ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of an element, by the format's name of the dtype."""


class BadTensorFile(ValueError):
    """The file is no safetensors file, or not a whole one; the message says why, and does not name the file."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: ``nbytes`` bytes from ``start`` on, row by row, little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(head: bytes, size: int) -> list[StoredTensor]:
    """The tensors that the first bytes ``head`` of a file of ``size`` bytes describe, in the order of their bytes.

    Raises ``BadTensorFile`` where the header is not whole, tensors overlap or leave gaps, or the file's size is not
    what the header says.
    """
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER) or len(head) < 8 + length:
        raise BadTensorFile("it has no header")
    try:
        described = json.loads(head[8 : 8 + length])
        found = [_stored(name, told, 8 + length) for name, told in described.items() if name != "__metadata__"]
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
    """What :func:`read_header` says of the file of ``size`` bytes that ``stream`` is at the beginning of."""
    start = stream.read(8)
    length = int.from_bytes(start, "little")
    return read_header(start + stream.read(length) if length <= MAX_HEADER else start, size)


def read_metadata(stream: BinaryIO, size: int) -> dict[str, str]:
    """What the file of ``size`` bytes that ``stream`` is at the beginning of says of itself (``__metadata__``).

    Raises ``BadTensorFile``; of a file that :func:`read_head` has read, where that is no text.
    """
    length = int.from_bytes(stream.read(8), "little")
    try:
        found = json.loads(stream.read(length) if length <= min(size, MAX_HEADER) else b"").get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError):
        raise BadTensorFile("its header cannot be read") from None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise BadTensorFile("its metadata is no text")
    return found


def write_header(tensors: Sequence[tuple[str, str, Sequence[int]]]) -> bytes:
    """The beginning of a file with tensors of such a name, dtype (as the format names it) and shape, in this order."""
    described: dict[str, Any] = {}
    start = 0
    for name, dtype, shape in tensors:
        end = start + math.prod(shape) * ITEM_SIZES[dtype]
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the first tensor is aligned
    return len(header).to_bytes(8, "little") + header


def _stored(name: str, told: Any, base: int) -> StoredTensor:
    shown = f"its tensor {name[:_SHOWN]!r}"
    begin, end = told["data_offsets"]
    dtype, shape = told["dtype"], tuple(told["shape"])
    if len(name) > MAX_NAME or not name.isprintable():
        raise BadTensorFile(f"the name of {shown} is too long, or no text")
    if not is_shape(shape) or not all(type(number) is int and 0 <= number <= _LIMIT for number in (begin, end)):
        raise BadTensorFile(f"the sizes of {shown} are no numbers, or too large")
    if dtype not in ITEM_SIZES or end - begin != math.prod(shape) * ITEM_SIZES[dtype]:
        raise BadTensorFile(f"the size of {shown} is not that of {str(dtype)[:_SHOWN]} {list(shape)}")
    return StoredTensor(name, dtype, shape, base + begin, end - begin)


def is_shape(numbers: Sequence[object]) -> bool:
    """Whether these are at most 64 ints, none below zero, of a product of at most 2**48, zeros apart."""
    return (
        len(numbers) <= 64
        and all(type(number) is int and 0 <= number <= _LIMIT for number in numbers)
        and math.prod(number or 1 for number in numbers if isinstance(number, int)) <= _LIMIT
    )


class TensorFile(Mapping[str, StoredTensor]):
    """A file's tensors by name, and their bytes without a copy. A context.

    Raises ``BadTensorFile`` when it is entered, and ``OSError`` where the file cannot be opened.
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bytes.release()
        self._map.close()

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def data(self, name: str) -> memoryview:
        """The tensor's bytes; not to be used after the context, and released before its end."""
        tensor = self._tensors[name]
        return self._bytes[tensor.start : tensor.start + tensor.nbytes]


def stamp(found: os.stat_result) -> list[int]:
    """Which file it is, and which bytes it has: another stamp means that they may be others."""
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


STEMS = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call the files of weights."""


def weight_files(folder: Path, variant: str | None = None, stems: Sequence[str] = STEMS) -> list[Path]:
    """The safetensors files of a component that its library loads: those of ``variant`` alone, or those without one.

    Empty where there are none. Raises ``BadTensorFile`` for an index that cannot be read or names a missing file.
    """
    for stem in stems:
        single = folder / f"{stem}.{f'{variant}.' if variant else ''}safetensors"
        indices = [index for index in _indices(folder, stem, variant) if index.is_file()]
        # with an index beside the file, diffusers takes the index, and transformers the file
        if single.is_file() and not (indices and stem == STEMS[0]):
            return [single]
        if indices:
            return _indexed(indices[0])
    return []


def _indices(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The names that an index may have; of a variant, the second is what diffusers wrote in former times."""
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
            raise BadTensorFile(f"{index.name} names {name!r}, which is not there")
    return [index.parent / name for name in sorted(names)]
