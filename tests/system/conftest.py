"""Fixtures of the tests that run the whole system: a real server with its scheduler and workers, over real sockets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from safelight.tests.live import LiveServer
from safelight.tests.tiny import save


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's tiny checkpoint."""
    directory: Path = tmp_path_factory.mktemp("tiny")
    return lambda name: save(name, directory)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as the server's worker has: the sums of a matrix product depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def flux(checkpoint: Callable[[str], Path]) -> Iterator[LiveServer]:
    """A ready server of the tiny FLUX, for the tests of one module that leave it as it was."""
    with LiveServer(checkpoint("flux"), ["--threads", "1"]) as server:
        yield server.wait_ready()
