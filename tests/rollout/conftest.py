"""Checkpoints of tiny pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from safelight.tests.tiny import save


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's tiny checkpoint."""
    directory: Path = tmp_path_factory.mktemp("tiny")
    return lambda name: save(name, directory)
