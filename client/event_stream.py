"""Decoder of server-sent events (WHATWG HTML, section 9.2); chunks may end anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class ServerSentEvent(NamedTuple):
    """One dispatched event; ``name`` is ``"message"`` if the server sent none."""

    name: str
    data: str


class EventDecoder:
    """Turns the chunks of a response body into events. An event without its closing blank line is dropped."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._after_cr = False
        self._name = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[ServerSentEvent]:
        """Yield the events that ``chunk`` completes. Lines end with LF, CR or CR LF, which two chunks may divide."""
        if self._after_cr and chunk:
            self._after_cr = False
            chunk = chunk.removeprefix(b"\n")
        for piece in chunk.splitlines(keepends=True):
            self._line += piece
            if piece.endswith((b"\n", b"\r")):
                yield from self._end_line()
            self._after_cr = piece.endswith(b"\r")

    def _end_line(self) -> Iterator[ServerSentEvent]:
        line = self._line.rstrip(b"\r\n").decode("utf-8", errors="replace").removeprefix("\ufeff")
        self._line.clear()
        if line:
            self._read_field(line)
            return
        if self._data:
            yield ServerSentEvent(self._name or "message", "\n".join(self._data))
        self._name, self._data = "", []

    def _read_field(self, line: str) -> None:
        """Unknown fields are ignored, and so are comments: a line that starts with a colon has an empty field name."""
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            self._name = value
        elif field == "data":
            self._data.append(value)
