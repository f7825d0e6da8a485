"""Fixtures of the tests that run the whole system: a real server with its scheduler and workers, over real sockets."""

from __future__ import annotations

import pytest

from safelight.tests.live import LiveServer
from safelight.tests.serving import Servers


@pytest.fixture
def flux(servers: Servers) -> LiveServer:
    """A ready server of the tiny FLUX, for tests that leave it as it was."""
    return servers("flux")
