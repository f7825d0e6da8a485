"""Fixtures of the tests on a GPU. ``TEST_DEVICE=played`` plays one, in this process and in those that it starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from safelight.tests import played

from .device import DEVICES, PLAYED
from .results import Results

if PLAYED:
    played.install(DEVICES)
    played.RECORD.notes_waits = False


def pytest_collection_modifyitems(config: pytest.Config) -> None:
    """Write the results where ``DEVICE_RESULTS`` names a file, from the process that hears of all tests."""
    path = os.environ.get("DEVICE_RESULTS")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Results(Path(path)))


@pytest.fixture(autouse=True)
def _like_a_rank(like_a_rank: None) -> None: ...


@pytest.fixture
def lagging(record: played.Record) -> Iterator[None]:
    """Copies on other streams happen as late as they may."""
    record.lags = True
    yield
    record.lags = False


@pytest.fixture
def record() -> Iterator[played.Record]:
    """The record of the played devices, which notes waits and has its limits back at the end."""
    found = played.RECORD
    found.clear()
    found.notes_waits = True
    yield found
    found.notes_waits = False
    for index in range(DEVICES):
        found.memory(index).limit = played.Memory().limit
    found.clear()
