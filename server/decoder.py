"""``python -m safelight.server.decoder``: decodes the pictures of one request after the other, and can be ended.

It reads requests from standard input and writes replies to standard output, each behind its length. A request that
takes too much CPU time ends the process: nothing else can interrupt a codec.
"""

from __future__ import annotations

import signal
import sys
import warnings
from typing import IO

import msgspec

from ..protocol.codec import Buffer
from ..protocol.errors import ErrorInfo, SafelightError
from ..protocol.generation import Image
from .images import read_images


class DecodingTask(msgspec.Struct, frozen=True):
    texts: list[str]
    """Pictures as data URIs or base64, behind which come the files."""
    files: list[bytes]
    max_pixels: int
    cpu_s: float


class Decoded(msgspec.Struct, frozen=True):
    """The pictures as (width, height, rows of RGB), or why there are none."""

    pictures: list[tuple[int, int, bytes]] = []
    error: ErrorInfo | None = None


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # whose default is to end the process
    warnings.simplefilter("ignore")  # of odd files, which strangers send as often as they like
    while data := receive(sys.stdin.buffer):
        task = msgspec.msgpack.decode(data, type=DecodingTask)
        signal.setitimer(signal.ITIMER_PROF, task.cpu_s)
        decoded = _decode(task)
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(sys.stdout.buffer, msgspec.msgpack.encode(decoded))


def _decode(task: DecodingTask) -> Decoded:
    try:
        images = read_images([*task.texts, *task.files], task.max_pixels)
    except SafelightError as error:
        return Decoded(error=error.info())
    return Decoded([(image.width, image.height, bytes(image.rgb.data)) for image in images])


def as_images(decoded: Decoded) -> list[Image]:
    return [Image(width, height, Buffer(rows)) for width, height, rows in decoded.pictures]


def send(stream: IO[bytes], data: bytes) -> None:
    stream.write(len(data).to_bytes(8, "little"))
    stream.write(data)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes:
    """Read one message; empty at the end of the stream."""
    head = stream.read(8)
    data = stream.read(int.from_bytes(head, "little")) if len(head) == 8 else b""
    return data if len(data) == int.from_bytes(head, "little") else b""


if __name__ == "__main__":
    main()
