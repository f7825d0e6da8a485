"""A small coverage-guided fuzzer: streams that reach new code are kept, and changed further."""

from __future__ import annotations

import pickletools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
NUMBERS = [b"K\0", b"K\x7f", b"M\xff\xff", b"J\xff\xff\xff\xff", b"J\0\0\0\x80", b"\x8a\x08" + b"\xff" * 7 + b"\x7f"]
VALUES = [
    b"N",
    b"\x88",
    b"\x89",
    b"]",
    b"}",
    b")",
    b"(",
    b"\x94",
    b"0",
    b"1",
    b"2",
    b"K\x18",
    b"C\0",
    b"\x8c\0",
    *NUMBERS,
]
WORDS = [
    "torch",
    "Tensor",
    "Size",
    "float32",
    "bfloat16",
    "os",
    "system",
    "builtins",
    "eval",
    "collections",
    "OrderedDict",
]
WORDS += ["torch.multiprocessing.reductions", "rebuild_tensor", "rebuild_storage_filename", "rebuild_storage_fd"]
TOKENS = [*VALUES, *(b"\x8c%c%s" % (len(word), word.encode()) for word in WORDS), *(b"c%s\n%s\n" % (b"os", b"system"),)]


class Coverage:
    """Which steps from line to line of ``modules`` were taken, and how many lines were run."""

    def __init__(self, modules: Sequence[ModuleType]) -> None:
        self._files = {module.__file__ for module in modules}
        self.steps: set[tuple[str, int, int]] = set()
        self.lines = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._called)
        try:
            yield
        finally:
            sys.settrace(before)

    def _called(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if frame.f_code.co_filename not in self._files:
            return None
        last, name = 0, frame.f_code.co_filename

        def line(frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
            nonlocal last
            self.lines += 1
            self.steps.add((name, last, frame.f_lineno))
            last = frame.f_lineno
            return line

        return line


def tokens(stream: bytes) -> list[bytes]:
    """The stream in pieces of an opcode with its argument; what cannot be read is one piece."""
    starts: list[int] = []
    try:
        starts.extend(at for _, _, at in pickletools.genops(stream) if at is not None)
    except Exception:  # noqa: BLE001  a stream that was changed may be anything
        starts = starts or [0]
    pieces = [stream[start:end] for start, end in zip(starts, [*starts[1:], len(stream)], strict=True)]
    return [piece for piece in pieces if piece]


def changed(stream: bytes, corpus: Sequence[bytes], chance: random.Random) -> bytes:
    """The stream with some pieces or bytes replaced, moved, repeated, left out, or taken from another."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        pieces = tokens(stream) if chance.random() < 0.7 else [bytes([byte]) for byte in stream]
        at = chance.randrange(len(pieces) + 1)
        end = min(len(pieces), at + chance.choice((1, 1, 1, 2, 8)))
        other = tokens(chance.choice(corpus))
        start = chance.randrange(len(other) + 1)
        pieces[at:end] = chance.choice(
            (
                [],
                pieces[at:end] * 2,
                [chance.choice(TOKENS)],
                [chance.choice(TOKENS), *pieces[at:end]],
                [chance.choice(OPCODES)],
                [chance.randbytes(1)],
                [piece[:-1] + bytes([piece[-1] ^ 1 << chance.randrange(8)]) for piece in pieces[at:end]],
                other[start : start + chance.choice((1, 4, 16))],
            )
        )
        stream = b"".join(pieces)
    return stream
