"""Fixtures of the tests that run the whole system: a real server with its scheduler and workers, over real sockets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from safelight.tests.live import LiveServer
from safelight.tests.serving import Servers


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as the server's worker has: the sums of a matrix product depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def flux(servers: Servers) -> LiveServer:
    """A ready server of the tiny FLUX, for tests that leave it as it was."""
    return servers("flux")
