"""Pictures that take minutes to decode hold up nobody for as long, and control routes not at all."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import struct
import subprocess
import sys
import zlib

import numpy as np
import psutil
import pytest

from safelight.protocol.errors import InvalidRequest, QueueFull, Unavailable
from safelight.server import picture_decoding
from safelight.server.images import read_images
from safelight.server.picture_decoding import PictureDecoding

from .test_images import file, picture

pytestmark = pytest.mark.anyio

LIMIT = 16_000_000


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def slow_png(chunks: int, side: int = 2400) -> bytes:
    """A black picture, and empty chunks by the million, which Pillow reads one by one."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(side * (side + 1))))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"abCd", b"") * chunks + data + chunk(b"IEND", b"")


async def test_pictures_are_those_that_this_process_would_read() -> None:
    decoding = PictureDecoding()
    files = [file(picture()), file(picture(size=(16, 8)), "JPEG")]
    assert await decoding.read(files, LIMIT) == read_images(files, LIMIT)
    with pytest.raises(InvalidRequest) as here:
        read_images(["AAAA"], LIMIT)
    with pytest.raises(InvalidRequest) as there:
        await decoding.read(["AAAA"], LIMIT)
    assert there.value.info() == here.value.info()


async def test_a_picture_that_takes_too_long_ends_its_process_and_the_next_is_read() -> None:
    decoding = PictureDecoding(cpu_s=1.0)
    with pytest.raises(InvalidRequest, match="more than 1 s to decode"):
        await decoding.read([slow_png(4_000_000)], LIMIT)
    (image,) = await decoding.read([file(picture())], LIMIT)
    assert np.frombuffer(bytes(image.rgb), np.uint8).size == 3 * image.width * image.height


async def test_a_decoder_that_is_killed_or_stopped_costs_one_request_and_says_so() -> None:
    decoding = PictureDecoding(wall_s=0.5)
    image = file(picture())

    async def one_of_them(number: signal.Signals) -> None:
        before = set(psutil.Process().children())
        asked = asyncio.create_task(decoding.read([slow_png(4_000_000)], LIMIT))
        while not (started := set(psutil.Process().children()) - before):
            await asyncio.sleep(0.01)
        started.pop().send_signal(number)
        with pytest.raises(Unavailable, match="was killed"):
            await asked

    await one_of_them(signal.SIGSTOP)
    await one_of_them(signal.SIGKILL)
    assert len(await PictureDecoding().read([image], LIMIT)) == 1


async def test_a_large_file_of_few_pixels_is_refused_by_its_size() -> None:
    with pytest.raises(InvalidRequest, match="too large for its pixels"):
        read_images([slow_png(0, side=16)[:-12] + chunk(b"abCd", bytes(5_000_000)) + chunk(b"IEND", b"")], LIMIT)


async def test_more_pictures_than_may_wait_are_refused_and_the_rest_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_decoding, "MAX_WAITING", 4)
    decoding = PictureDecoding()
    asked = await asyncio.gather(*(decoding.read([file(picture())], LIMIT) for _ in range(10)), return_exceptions=True)
    assert [type(answer) for answer in asked] == [list] * 4 + [QueueFull] * 6
    assert len(await decoding.read([file(picture())], LIMIT)) == 1


SERVER = """
import asyncio, os, psutil, signal
from safelight.protocol.errors import InvalidRequest
from safelight.server.picture_decoding import PictureDecoding
decoding = PictureDecoding()
try:
    asyncio.run(decoding.read(["AAAA"], 100))
except InvalidRequest:
    print(*(child.pid for child in psutil.Process().children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


async def test_a_decoder_ends_with_its_server_however_that_ends() -> None:
    killed = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-P", "-c", SERVER], capture_output=True, text=True
    )
    with contextlib.suppress(psutil.NoSuchProcess):
        await asyncio.to_thread(psutil.Process(int(killed.stdout)).wait, 60)


async def test_the_end_of_a_server_waits_for_no_decoder_that_is_stopped() -> None:
    before = psutil.Process().children()
    decoding = PictureDecoding()
    await decoding.read([file(picture())], LIMIT)
    for decoder in psutil.Process().children():
        if decoder not in before:
            decoder.suspend()
    reading = asyncio.create_task(decoding.read([file(picture())], LIMIT))
    await asyncio.sleep(0.1)
    decoding.close()
    with pytest.raises(Unavailable):
        await asyncio.wait_for(reading, 30)
