"""A live server of the embedded model, whose shared memory has to be empty when it has ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from safelight import assets
from safelight.client import Client
from safelight.tests.live import LiveServer
from safelight.tests.updates.trainer import Tensors, transformer

ASSETS = Path(assets.__file__).parent


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serving() as running:
        yield running


@contextmanager
def serving(*flags: str) -> Iterator[LiveServer]:
    """A program of its own: a forked one keeps what it frees, as its parent's environment has workers do."""
    flags = ("--threads", "1", "--weights-roots", str(ASSETS), *flags)
    with LiveServer("shapes", flags, program=True) as running:
        running.wait_ready()
        with Client(running.url) as client:
            shared = Path(client.info()["shared_memory"])
        yield running
        assert running.stop() == 0
    assert not shared.exists(), sorted(shared.rglob("*"))


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """The embedded model's transformer."""
    folder = tmp_path_factory.mktemp("shapes")
    DiffusionPipeline.from_pretrained(ASSETS / "shapes").save_pretrained(folder)
    return transformer(folder)
