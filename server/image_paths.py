"""Images that a request names by their paths: read where the server allows files to be read, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..protocol.config import Config
from ..protocol.errors import BodyTooLarge, InvalidRequest, NotFound
from .checkpoint_files import allowed

_FIELD = "image_path"
_MB = 1_000_000


def read_paths(paths: Sequence[str], config: Config) -> list[bytes]:
    """Read the files at ``paths``; their total size is bounded like a body's.

    Raises ``NotFound``, ``Forbidden`` outside the allowed roots, ``InvalidRequest`` for what is not a regular file, and
    ``BodyTooLarge``.
    """
    found = [_find(path, config) for path in paths]
    if sum(file.stat().st_size for file in found) > config.max_body_mb * _MB:
        raise BodyTooLarge(f"The files of image_path are larger than the {config.max_body_mb} MB of a body.")
    try:
        return [file.read_bytes() for file in found]
    except OSError as error:
        raise InvalidRequest(f"A file of image_path cannot be read ({error.strerror}).", field=_FIELD) from None


def _find(path: str, config: Config) -> Path:
    try:
        found = allowed(Path(path), config, _FIELD)
    except (OSError, ValueError, RuntimeError) as error:  # missing, too long, a loop of links
        raise NotFound(f"There is nothing at {path[:200]!r} ({type(error).__name__}).", field=_FIELD) from None
    if not found.is_file():
        raise InvalidRequest(f"{path[:200]!r} is not a file.", field=_FIELD)
    return found
