"""Fixtures of the worker's tests: tiny models, saved once, loaded through the worker's own loader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from safelight.protocol.config import Config
from safelight.tests.tiny import save
from safelight.worker.model.model import Model, load_model


@pytest.fixture(autouse=True)
def _like_a_rank(like_a_rank: None) -> None: ...


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Loads a family's tiny model, each time anew."""
    directory: Path = tmp_path_factory.mktemp("tiny")
    return lambda name: load_model(Config(model=str(save(name, directory)), device="cpu"))
