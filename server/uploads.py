"""safetensors bodies, streamed into the server's shared-memory directory while they arrive."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import shutil
import stat
from collections.abc import AsyncIterator
from io import FileIO
from pathlib import Path
from typing import Self

from fastapi import Request

from ..formats.tensor_files import BadTensorFile, read_header
from ..protocol.errors import InvalidRequest, QueueFull, Unavailable
from .upload_turns import SLOW_BYTES_S, Turn, Turns

MAX_HEADER = 16 << 20
"""Bytes of a body's header; a tensor takes about a hundred."""

IDLE_S = 60.0
"""Seconds without a byte after which a body has ended."""

_RETRY_S = 5.0

_TOGETHER = 4 << 20
"""Bytes that are written at a time, in a thread, while the next ones arrive."""


class Uploads:
    """Receives bodies into folders of their own below ``shared``."""

    def __init__(self, shared: Path) -> None:
        self._shared = shared
        self._turns = Turns()
        self.held = 0
        """Bytes of all bodies that are there or announced, until what they are for is done."""

    def receive(self, request: Request) -> Upload:
        """A context with the body's file, which is gone after it.

        On entry it raises ``InvalidRequest`` for a body that is not a safetensors file, ``Unavailable`` if memory is
        full, and ``QueueFull`` if other bodies take most of it.
        """
        return Upload(self._shared / f"upload-{secrets.token_hex(8)}", self, self._turns, request)

    def take(self, size: int) -> None:
        """Count a body that is to come. Others need shared memory too, so all together take half; one may take all."""
        most = half_of(self._shared)
        if self.held and self.held + size > most:
            raise QueueFull(
                f"Other bodies take {self.held >> 20} MB of shared memory, and all together may have {most >> 20} MB. "
                f"Ask again in {_RETRY_S:.0f} s.",
                retry_after_s=_RETRY_S,
            )
        self.held += size


def half_of(memory: Path) -> int:
    """Bytes."""
    size = os.statvfs(memory)
    return size.f_blocks * size.f_frsize // 2


class Upload:
    def __init__(self, folder: Path, uploads: Uploads, turns: Turns, request: Request) -> None:
        self.file = folder / "tensors.safetensors"
        self._folder = folder
        self._uploads = uploads
        self._turns = turns
        self._request = request
        self._size = 0

    async def __aenter__(self) -> Self:
        announced = self._request.headers.get("content-length", "")
        if not announced.isdigit():
            raise InvalidRequest("A safetensors body needs a Content-Length.")
        self._uploads.take(int(announced))
        self._size = int(announced)
        try:
            async with self._turns.turn() as turn:
                self._folder.mkdir(mode=0o700)
                await _receive(self._request, self.file, self._size, turn)
        except BaseException as error:
            await self._remove()
            if isinstance(error, BadTensorFile):
                raise InvalidRequest(f"The body is not a safetensors file: {error}.") from None
            if isinstance(error, TimeoutError):
                raise InvalidRequest(f"No more of the body came for {IDLE_S:g} seconds.") from None
            if isinstance(error, OSError):
                raise Unavailable(f"The body could not be kept in shared memory: {error.strerror}.") from error
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._remove()

    async def _remove(self) -> None:
        removing = asyncio.ensure_future(asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True))
        removing.add_done_callback(self._give_back)  # also where nobody waits for it any more
        await asyncio.shield(removing)

    def _give_back(self, removing: asyncio.Future[None]) -> None:
        self._uploads.held -= self._size


async def _receive(request: Request, file: Path, size: int, turn: Turn) -> None:
    """Write the body of ``size`` bytes. Its header is checked when it is there, before what comes behind it is kept.

    Raises ``QueueFull`` where the body was slow and others waited.
    """
    try:
        await _receive_in_time(request, file, size, turn)
    except TimeoutError:
        if not turn.must_end:
            raise
        raise QueueFull(
            f"The body came with less than {SLOW_BYTES_S >> 20} MB a second, and others waited for its turn.",
            retry_after_s=_RETRY_S,
        ) from None


async def _receive_in_time(request: Request, file: Path, size: int, turn: Turn) -> None:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(IDLE_S) as idle:
        turn.timed_by(idle)
        chunks = _counted(request.stream(), turn)
        head = await _head(chunks, size)
        await asyncio.to_thread(read_header, bytes(head), size)
        free = os.statvfs(file.parent)
        if size > free.f_bavail * free.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        batch, waiting, received = [bytes(head)], len(head), len(head)
        with file.open("xb", buffering=0) as stream:
            writing = asyncio.ensure_future(asyncio.sleep(0))
            try:
                async for chunk in chunks:
                    if turn.must_end:
                        raise TimeoutError
                    idle.reschedule(loop.time() + IDLE_S)
                    batch.append(chunk)
                    waiting += len(chunk)
                    received += len(chunk)
                    if waiting >= _TOGETHER:
                        await writing
                        writing = asyncio.ensure_future(asyncio.to_thread(_write, stream, batch))
                        batch, waiting = [], 0
            finally:
                await writing
            await asyncio.to_thread(_write, stream, batch)
    if received != size:
        raise BadTensorFile(f"it has {received} bytes and not {size}")


async def _counted(chunks: AsyncIterator[bytes], turn: Turn) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        turn.received(len(chunk))
        yield chunk


async def _head(chunks: AsyncIterator[bytes], size: int) -> bytearray:
    """The bytes received when the header is complete."""
    head = bytearray()
    async for chunk in chunks:
        head += chunk
        length = int.from_bytes(head[:8], "little")
        if len(head) >= 8 and not 2 <= length <= min(size - 8, MAX_HEADER):
            raise BadTensorFile("it has no header, or a very large one")
        if len(head) >= 8 + length and len(head) >= 8:
            break
    return head


def _write(stream: FileIO, batch: list[bytes]) -> None:
    """All of it, or it raises ``OSError``: a memory that is full takes a part of the bytes."""
    for data in batch:
        left = memoryview(data)
        while left:
            left = left[stream.write(left) :]


def shared_file(shared: Path, path: str) -> Path:
    """The file that a client has put into ``shared``. Raises ``InvalidRequest`` for one that is elsewhere."""
    found = Path(path)
    try:
        resolved = found.resolve(strict=True)
        regular = stat.S_ISREG(found.lstat().st_mode)
    except (OSError, ValueError, RuntimeError):
        raise InvalidRequest(f"There is no file {path[:1000]}.", field="shared.path") from None
    if not resolved.is_relative_to(shared.resolve()) or not regular:
        raise InvalidRequest(
            f"The file must lie in {shared}, the server's shared-memory directory (see /server_info).",
            field="shared.path",
        )
    return resolved
