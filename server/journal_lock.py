"""A journal of weights belongs to one server at a time: two would remove each other's entries."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..protocol.errors import StartFailed


@contextmanager
def own_journal(directory: str | None) -> Iterator[None]:
    """Raises ``StartFailed`` where the directory cannot be made, or is another running server's."""
    if directory is None:
        yield
        return
    with _locked(Path(directory)):
        yield


def _locked(directory: Path) -> IO[str]:
    file = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / "lock").open("a")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if file is not None:
            file.close()
        why = "it is another running server's" if isinstance(error, BlockingIOError) else error.strerror or error
        raise StartFailed(f"The journal {directory} cannot be used ({why}); give another --weights-journal.") from None
    return file
