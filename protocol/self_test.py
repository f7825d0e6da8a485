"""The result of a replica's self-test, which later starts of the same server reuse."""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from typing import Literal

import msgspec

from .replicas import Accuracy, Batching, BatchingMode

RESULT_FILE = "self-test.json"
"""The result of a running server, in its own directory."""


class TaskResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result for one task.

    ``tried_size`` are the arguments of the size at which it ran, ``required`` those that it did not run without.
    """

    pipeline: str
    output_type: Literal["pt", "np"]
    several_images: bool
    supports_preview: bool
    batching: Batching
    tried_size: dict[str, int | None]
    required: list[str]


class SelfTestResult(msgspec.Struct, frozen=True, kw_only=True):
    """The batcher's mode, the calls that must run alone and why, and the tasks that the model does.

    ``incomplete``: a task did not run, perhaps for lack of memory. ``accuracy`` is that of each quantized component.
    """

    mode: BatchingMode
    unmergeable: dict[str, str]
    text: TaskResult | None
    image: TaskResult | None
    no_image: str
    incomplete: bool = False
    accuracy: dict[str, Accuracy] = {}

    def write(self, file: Path) -> None:
        """Write ``file``, whole or not at all. Raises ``OSError``."""
        new = file.with_suffix(f".{secrets.token_hex(8)}")
        try:
            new.write_bytes(msgspec.json.encode(self))
            new.replace(file)
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink()  # written in part, on a full disk
            raise


def read_result(directory: Path) -> SelfTestResult | None:
    """The result of the server's first replica that was ready; ``None`` before there was one. Raises ``OSError``."""
    file = directory / RESULT_FILE
    return msgspec.json.decode(file.read_bytes(), type=SelfTestResult) if file.exists() else None
