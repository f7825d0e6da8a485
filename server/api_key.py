"""The server's API key, from the configuration or from a file."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..protocol.config import Config
from ..protocol.errors import StartFailed


def with_key(config: Config) -> Config:
    """``config`` with the key that its file holds. Raises ``StartFailed`` for a key that no client could send."""
    key = config.api_key
    if config.api_key_file is not None:
        if key is not None:
            raise StartFailed("The API key is given twice, by itself and with --api-key-file; leave one of them out.")
        key = _read(Path(config.api_key_file))
    if key is not None and (not key or not key.isprintable() or any(map(str.isspace, key))):
        raise StartFailed("The API key must be at least one character long and without spaces and line ends.")
    return msgspec.structs.replace(config, api_key=key)


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise StartFailed(f"The API key cannot be read from {file}: {reason}.") from None
