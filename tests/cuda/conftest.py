"""Fixtures of the tests on a GPU. ``TEST_DEVICE=played`` plays one, in this process and in those that it starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

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
def _like_the_worker() -> Iterator[None]:
    """One thread, and gradients off, as in a rank's process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    from safelight.tests.tiny import save

    directory: Path = tmp_path_factory.mktemp("tiny")
    return lambda name: save(name, directory)
