"""A trainer to receive from, and what must not happen meanwhile."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from safelight.worker.weights.transport import shm_segment as segment

from .streams import SEGMENT
from .trainer import Trainer


@pytest.fixture(scope="module")
def trainer() -> Iterator[Trainer]:
    with Trainer() as started:
        yield started


@pytest.fixture
def fresh_trainer() -> Iterator[Trainer]:
    with Trainer() as started:
        yield started


@pytest.fixture
def segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of segments with one of 2×3 float32, which two own."""
    folder = tmp_path / "shm"
    folder.mkdir()
    (folder / SEGMENT.decode()[1:]).write_bytes(struct.pack("<i60x6f", 2, *range(6)))
    monkeypatch.setattr(segment, "_FOLDER", folder)
    return folder
