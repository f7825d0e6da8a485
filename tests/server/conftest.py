"""Fixtures of the server's tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def anyio_backend() -> str:
    """Asynchronous tests run under asyncio alone, as the server does."""
    return "asyncio"


@pytest.fixture(autouse=True)
def _untouched_logging() -> Iterator[None]:
    """``main`` sends the log to standard error; the next test gets pytest's own back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny pipeline with random weights."""
    from safelight.tests.tiny import save  # imports torch, which most of these tests do without

    return save("flux", tmp_path_factory.mktemp("models"))
