"""safetensors bodies, streamed into the server's shared-memory directory while they arrive."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from fastapi import Request

from ..protocol.errors import InvalidRequest, Malformed, Unavailable
from ..protocol.tensor_files import MAX_HEADER, BadTensorFile, read_header


class Upload:
    """A file in a folder of its own below ``shared``, which :meth:`remove` removes unless a worker has done so."""

    def __init__(self, shared: Path) -> None:
        self.folder = shared / f"upload-{secrets.token_hex(8)}"
        self.file = self.folder / "tensors.safetensors"

    async def receive(self, request: Request) -> None:
        """Take in the body. The header is checked before the data come.

        Raises ``Malformed`` for what is no safetensors file, and ``Unavailable`` where the memory is full.
        """
        announced = request.headers.get("content-length", "")
        size = int(announced) if announced.isdigit() else None
        head, checked, received = bytearray(), False, 0
        try:
            self.folder.mkdir(mode=0o700)
            with self.file.open("xb", buffering=0) as stream:
                if size is not None:
                    os.posix_fallocate(stream.fileno(), 0, max(1, size))  # or there is no room, known at once
                async for chunk in request.stream():
                    received += len(chunk)
                    if not checked:
                        head += chunk
                        checked = _check(bytes(head), size) if size is not None else True
                    stream.write(chunk)
                stream.truncate(received)
        except BadTensorFile as error:
            raise Malformed(f"The body is no safetensors file: {error}.") from None
        except OSError as error:
            raise Unavailable(f"The body could not be kept in shared memory: {error.strerror}.") from error
        if size is not None and received != size:
            raise Malformed(f"The body ended after {received} of {size} bytes.")

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _check(head: bytes, size: int) -> bool:
    """Whether the header has come, and is one. Raises ``BadTensorFile``."""
    length = int.from_bytes(head[:8], "little")
    if len(head) >= 8 and not 2 <= length <= min(size - 8, MAX_HEADER):
        raise BadTensorFile("it has no header")
    if len(head) < 8 + length and len(head) < size:
        return False
    read_header(head, size)
    return True


def shared_file(shared: Path, path: str) -> Path:
    """The file that a client has put into ``shared``. Raises ``InvalidRequest`` for one that is elsewhere."""
    found = Path(path)
    try:
        resolved = found.resolve(strict=True)
    except (OSError, ValueError):
        raise InvalidRequest(f"There is no file {path}.", field="shared.path") from None
    if not resolved.is_relative_to(shared.resolve()) or not resolved.is_file() or found.is_symlink():
        raise InvalidRequest(
            f"The file must lie in {shared}, the server's shared-memory directory (see /server_info).",
            field="shared.path",
        )
    return resolved
