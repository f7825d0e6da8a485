"""JSON and msgpack read under a bound: what a body costs to read follows from its values, not from its bytes alone.

Parsers hold the interpreter until they are done, so a thread does not help: what would take long is refused before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import numpy as np
from fastapi import Request

from ..protocol.errors import BodyTooLarge, Malformed

T = TypeVar("T")

MAX_VALUES = 20_000
"""Values of a JSON body, where its route says nothing else."""

MAX_TEXT = 1_000_000
"""Bytes of a generation's body without its pictures and tensors."""

_MAX_DEPTH = 64
_MAX_FIELDS = 256
_SMALL = 64 * 1024
_PART = 1 << 20
_SEPARATORS = b",[{"
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


async def read_body(request: Request) -> bytearray:
    """The whole body, which nothing else keeps, and no error's traceback either."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
    except BaseException:
        body.clear()
        raise
    return body


async def parse(body: bytearray, read: Callable[[bytearray], T], max_values: int = MAX_VALUES) -> T:
    """``read(body)`` for a JSON body of at most ``max_values`` values, in a thread unless it is small."""
    if len(body) <= _SMALL:
        return _parse(body, read, max_values)
    return await asyncio.to_thread(_parse, body, read, max_values)


def _parse(body: bytearray, read: Callable[[bytearray], T], max_values: int) -> T:
    check_json(body, max_values)
    return read(body)


def check_json(text: bytes | bytearray, max_values: int) -> None:
    """Raises ``BodyTooLarge`` for more values, and ``Malformed`` for deep ones. What is not JSON may pass."""
    if _count(text, _SEPARATORS) < max_values and _count(text, b"[{") <= _MAX_DEPTH:
        return
    # The commas and brackets may be those of a prompt, so look again without the strings, if these are not too many.
    plain = text.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in text else text
    outside = b"".join(plain.split(b'"')[::2]) if _count(plain, b'"') <= 4 * max_values else text
    if _count(outside, _SEPARATORS) >= max_values:
        raise BodyTooLarge(f"The body has more than the {max_values} values that this route takes.")
    _check_depth(outside.translate(None, _NO_BRACKETS))


def _count(text: bytes | bytearray, characters: bytes) -> int:
    """How many bytes of ``text`` are ``characters``. A large text is counted without ``bytes.count``, which keeps other
    threads from running."""
    if len(text) <= _SMALL:
        return sum(map(text.count, characters))
    found = 0
    for start in range(0, len(text), _PART):
        part = np.frombuffer(text, np.uint8, min(_PART, len(text) - start), start)
        found += sum(int(np.count_nonzero(part == character)) for character in characters)
    return found


def _check_depth(brackets: bytes | bytearray) -> None:
    for _ in range(_MAX_DEPTH):
        if not brackets:
            return
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    if brackets:
        raise Malformed(f"The body is nested more than {_MAX_DEPTH} deep, or it is not JSON.")


class _Tensor(msgspec.Struct, frozen=True):
    is_tensor: bool = msgspec.field(name="__tensor__", default=False)
    data: msgspec.Raw = msgspec.Raw()


_LARGE: dict[str, Any] = {"image": str | list[str] | None, "initial_noise": _Tensor | None}
"""Fields of a msgpack body that may have more than ``MAX_TEXT`` bytes."""


def read_msgpack(body: bytearray) -> dict[str, Any]:
    """A msgpack map of few fields. Raises ``Malformed`` and ``BodyTooLarge``."""
    try:
        if _entries(body) > _MAX_FIELDS:
            raise BodyTooLarge(f"The body has more than {_MAX_FIELDS} fields.")
        fields = msgspec.msgpack.decode(body, type=dict[str, msgspec.Raw])
        if any(_entries(memoryview(raw)) > _MAX_FIELDS for name, raw in fields.items() if name in _LARGE):
            raise BodyTooLarge(f"A list in the body has more than {_MAX_FIELDS} elements.")
        if sum(len(raw) for name, raw in fields.items() if name not in _LARGE) > MAX_TEXT:
            raise BodyTooLarge(f"The fields of the body have more than {MAX_TEXT / 1e6:g} MB without image and noise.")
        found = {name: msgspec.msgpack.decode(raw, type=_LARGE.get(name, Any)) for name, raw in fields.items()}
        return {name: _as_map(value) if isinstance(value, _Tensor) else value for name, value in found.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"The body cannot be read as a msgpack map: {error}.") from None


def _as_map(tensor: _Tensor) -> dict[str, Any]:
    try:
        data: bytes | str = msgspec.msgpack.decode(tensor.data, type=bytes)
    except msgspec.ValidationError:
        data = msgspec.msgpack.decode(tensor.data, type=str)
    return {"__tensor__": tensor.is_tensor, "data": data}


def _entries(value: bytes | bytearray | memoryview) -> int:
    """How many entries a long map or array announces; 0 for anything else, which the parser says better."""
    match value[0] if value else 0:
        case 0xDC | 0xDE:
            return int.from_bytes(value[1:3], "big")
        case 0xDD | 0xDF:
            return int.from_bytes(value[1:5], "big")
        case _:
            return 0
