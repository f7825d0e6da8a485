"""Tiny checkpoints, and the calls that their pipelines make."""

from __future__ import annotations

from pathlib import Path

import pytest

from safelight.tests.tiny import save


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which checkpoints are saved as they are needed."""
    return tmp_path_factory.mktemp("accuracy")


@pytest.fixture(scope="session")
def flux(tiny: Path) -> Path:
    return save("flux", tiny)
