"""Streams made by hand, and a watch over what reading them does."""

from __future__ import annotations

import base64
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from safelight.worker.weights.checkpoint.names import Tensors
from safelight.worker.weights.transport import payload
from safelight.worker.weights.transport import rebuild as received
from safelight.worker.weights.transport.allowlist import NotAPayload
from safelight.worker.weights.transport.payload import interpret
from safelight.worker.weights.transport.shm_segment import Segments

START = b"\x80\x04"
SEGMENT = b"/torch_1_2_3"
MANAGER = b"/tmp/torch-shm-dir-aB3dE6/manager.sock"


def unpickle(stream: bytes, *, release: bool = True) -> Any:
    """The stream's value, for the only reader, or for one that leaves the release to another."""
    segments = Segments()
    try:
        return received.unpickle(stream, segments)
    finally:
        if release:
            segments.release()


def decode(encoded: str, modules: Sequence[str], *, release: bool = True) -> Tensors:
    """The tensors of a payload in base64, in the same way."""
    segments = Segments()
    try:
        return payload.decode(base64.b64decode(encoded), modules, segments)
    finally:
        if release:
            segments.release()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def data(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def several(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def called(function: bytes, *args: bytes) -> bytes:
    return function + several(*args) + b"R"


def reduction(name: str) -> bytes:
    return named("torch.multiprocessing.reductions", name)


TENSOR, SIZE, UNTYPED = named("torch", "Tensor"), named("torch", "Size"), named("torch.storage", "UntypedStorage")
FLOAT = named("torch", "float32")


def storage(manager: bytes = MANAGER, handle: bytes = SEGMENT, nbytes: bytes = number(24)) -> bytes:
    return called(reduction("rebuild_storage_filename"), UNTYPED, data(manager), data(handle), nbytes)


def numbers(*values: int) -> bytes:
    return several(*map(number, values))


def tensor(
    size: bytes = numbers(2, 3),
    stride: bytes = numbers(3, 1),
    offset: bytes = number(0),
    shared: bytes | None = None,
    dtype: bytes = FLOAT,
    grad: bytes = b"\x89",
    cls: bytes = TENSOR,
) -> bytes:
    typed = called(reduction("rebuild_typed_storage"), storage() if shared is None else shared, dtype)
    return called(reduction("rebuild_tensor"), cls, typed, several(offset, called(SIZE, size), stride, grad))


def pairs(one: bytes) -> bytes:
    return START + b"](" + several(text("w"), one) + b"e."


_HARMLESS = {"sys.settrace", "builtins.id", "mmap.__new__", "ctypes.cdata", "ctypes.cdata/buffer"}
_watched: list[tuple[str, tuple[Any, ...]]] | None = None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _watched is not None:
        _watched.append((event, args))


sys.addaudithook(_hook)


@contextmanager
def nothing_runs(folder: Path) -> Iterator[None]:
    """Nothing is imported, compiled, run, connected, or opened outside the folder of segments; no module is new."""
    global _watched
    before, _watched = set(sys.modules), []
    try:
        yield
    finally:
        seen, _watched = _watched, None
    for event, args in seen:
        if event in {"open", "os.remove"}:
            assert Path(args[0]).parent == folder, (event, args)
        else:
            assert event in _HARMLESS or isinstance(args[0], FrameType), (event, args)  # a frame: seen by the fuzzer
    assert set(sys.modules) == before


def refused(stream: bytes, folder: Path) -> str:
    """The sentence with which the stream is refused, by reading it and by what it means."""
    with nothing_runs(folder):
        try:
            interpret(unpickle(stream), ["transformer"])
        except NotAPayload as error:
            return str(error)
    pytest.fail(f"{stream!r} was taken for a payload")


def owners(folder: Path) -> int:
    """The owners of the one segment in ``folder``."""
    count: int = struct.unpack("<i", (folder / SEGMENT.decode()[1:]).read_bytes()[:4])[0]
    return count
