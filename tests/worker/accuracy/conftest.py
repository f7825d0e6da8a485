"""Tiny checkpoints, and the calls that their pipelines make."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from safelight.tests.tiny import save


@pytest.fixture(scope="package", autouse=True)
def _frozen() -> Iterator[None]:
    """A comparison collects garbage after each call; as in a rank, that is not to go through what libraries made."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which checkpoints are saved as they are needed."""
    return tmp_path_factory.mktemp("accuracy")


@pytest.fixture(scope="session")
def flux(tiny: Path) -> Path:
    return save("flux", tiny)
