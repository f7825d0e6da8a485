"""Standard error as JSON lines, also for output of C++ libraries, progress bars and a crashing interpreter."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from ..process.logs import as_json_line

_STDERR = 2
_LAST_S = 5.0  # until children that were killed have closed their end


@contextlib.contextmanager
def json_stderr() -> Iterator[None]:
    """Within it, lines of this process and of its children that are not JSON become the message of one that is."""
    destination = os.dup(_STDERR)
    read, write = os.pipe()
    os.dup2(write, _STDERR)
    os.close(write)
    relay = threading.Thread(target=_relay, args=(read, destination), daemon=True, name="stderr-relay")
    relay.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(destination, _STDERR)
        relay.join(_LAST_S)


def _relay(source: int, destination: int) -> None:
    with os.fdopen(source, "rb") as lines, os.fdopen(destination, "wb", buffering=0) as written:
        for line in lines:
            if text := line.decode(errors="replace").strip():
                written.write(as_json_line(text).encode() + b"\n")
