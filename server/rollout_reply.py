"""A rollout's reply: msgpack in pieces, in which the tensors' bytes are those that came from the worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from ..formats.digests import STORED_DTYPES
from ..formats.tensor_files import write_header
from ..protocol.generation import Output
from ..protocol.rollouts import TENSOR, RolledOut, Tensor

MEDIA_TYPE = "application/msgpack"

Piece = bytes | memoryview

_PART = 1 << 20
"""Bytes that are written to a connection at once."""


def pieces(outputs: list[Output], more: dict[str, Any]) -> list[Piece]:
    """The reply: a list with a map for each output, which has ``more`` in it."""
    found: list[Piece] = [_head(outputs, 0x90, 0xDC)]
    for output in outputs:
        assert output.rolled_out is not None, "it is a rollout's"
        found += _packed(more | output.rolled_out.reply, output.rolled_out)
    return found


def in_parts(pieces: list[Piece]) -> Iterator[Piece]:
    """The same bytes: small pieces put together, large ones cut, none of them copied."""
    small = bytearray()
    for piece in pieces:
        if len(piece) < _PART:
            small += piece
            if len(small) < _PART:
                continue
        if small:
            yield bytes(small)
            small.clear()
        if len(piece) >= _PART:
            view = memoryview(piece)
            yield from (view[start : start + _PART] for start in range(0, len(view), _PART))
    if small:
        yield bytes(small)


def _packed(value: Any, rolled_out: RolledOut) -> Iterator[Piece]:
    if isinstance(value, dict) and list(value) == [TENSOR]:
        yield from _tensor(value[TENSOR], rolled_out)
    elif isinstance(value, dict):
        yield _head(value, 0x80, 0xDE)
        for name, part in value.items():
            yield msgspec.msgpack.encode(name)
            yield from _packed(part, rolled_out)
    elif isinstance(value, list):
        yield _head(value, 0x90, 0xDC)
        for part in value:
            yield from _packed(part, rolled_out)
    else:
        yield msgspec.msgpack.encode(value)


def _tensor(number: int, rolled_out: RolledOut) -> Iterator[Piece]:
    tensor = rolled_out.tensors[number]
    described: dict[str, Any] = {TENSOR: True, "shape": tensor.shape, "dtype": tensor.dtype}
    if rolled_out.file is not None:
        yield msgspec.msgpack.encode(described | {"file": rolled_out.file, "name": str(number)})
        return
    yield b"\x84" + msgspec.msgpack.encode(described)[1:] + msgspec.msgpack.encode("data")
    yield from _file(tensor)


def _file(tensor: Tensor) -> Iterator[Piece]:
    """A safetensors file with the tensor ``t``, as a msgpack byte string."""
    head = write_header([("t", STORED_DTYPES[tensor.dtype], tensor.shape)])
    yield b"\xc6" + (len(head) + len(tensor.data)).to_bytes(4, "big") + head
    yield tensor.data.data


def _head(items: Any, short: int, long: int) -> bytes:
    """How msgpack begins a list or a map of so many items."""
    return bytes([short + len(items)]) if len(items) < 16 else bytes([long]) + len(items).to_bytes(2, "big")
