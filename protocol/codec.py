"""Messages as ZMQ frames: one msgpack frame, then one frame for each large buffer.

A :class:`Buffer` in a message is replaced by its frame's number, so pictures and tensors are neither copied into the
msgpack nor scanned by it. Nothing is ever pickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

M = TypeVar("M")


class Buffer:
    """Bytes that travel as a frame of their own."""

    __slots__ = ("data",)

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self.data = memoryview(data).cast("B")

    def __len__(self) -> int:
        return self.data.nbytes

    def __bytes__(self) -> bytes:
        return bytes(self.data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Buffer) and self.data == other.data

    __hash__ = None  # type: ignore[assignment]  # equality is by content, and the content may be writable

    def __repr__(self) -> str:
        return f"Buffer({len(self)} bytes)"


class Codec(Generic[M]):
    """Encodes and decodes one union of message types."""

    def __init__(self, messages: Any) -> None:  # Any: a typing union is not a class
        self._messages = messages

    def encode(self, message: M) -> list[bytes | memoryview]:
        """``message`` as frames, the msgpack first."""
        buffers: list[memoryview] = []

        def to_frame_number(value: object) -> int:
            if not isinstance(value, Buffer):
                raise NotImplementedError(f"{type(value).__name__} cannot travel")
            buffers.append(value.data)
            return len(buffers)

        head = msgspec.msgpack.encode(message, enc_hook=to_frame_number)
        return [head, *buffers]

    def decode(self, frames: Sequence[bytes | memoryview]) -> M:
        """Decode ``frames``. Raises ``msgspec.DecodeError`` for anything but a message of the union."""
        if not frames:
            raise msgspec.DecodeError("no frames")

        def from_frame_number(kind: type, value: Any) -> Any:  # Any: msgspec's own hook signature
            if kind is not Buffer or not isinstance(value, int) or not 0 < value < len(frames):
                raise msgspec.ValidationError("a buffer that no frame holds")
            return Buffer(frames[value])

        try:
            message: M = msgspec.msgpack.decode(frames[0], type=self._messages, dec_hook=from_frame_number)
        except (UnicodeDecodeError, RecursionError) as error:
            raise msgspec.DecodeError(f"not a message: {type(error).__name__}") from None
        return message
