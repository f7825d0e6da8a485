"""Live servers of the tiny FLUX whose weights are updated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from safelight.tests.live import LiveServer
from safelight.tests.tiny import save

from .trainer import Trainer

Serve = Callable[..., AbstractContextManager[Trainer]]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("flux", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def serve(checkpoint: Path) -> Serve:
    """A ready server with such flags, all of its replicas ready."""

    @contextmanager
    def serving(*flags: str, tp: int = 1) -> Iterator[Trainer]:
        with LiveServer(checkpoint, ["--threads", "1", "--tp", str(tp), *flags]) as server:
            server.wait_ready()
            trainer = Trainer(server, checkpoint, tp)
            trainer.wait_all_ready()
            yield trainer

    return serving


@pytest.fixture(scope="session")
def alone(serve: Serve) -> Iterator[Trainer]:
    """One replica of one rank, for the tests of all modules; each leaves the weights as they were."""
    with serve() as trainer:
        yield trainer


@pytest.fixture(scope="session")
def divided(serve: Serve) -> Iterator[Trainer]:
    """Two replicas of two ranks each, projections fused."""
    with serve("--replicas", "2", "--fuse-projections", tp=2) as trainer:
        yield trainer


@pytest.fixture(scope="module", params=["alone", "divided"])
def trainer(request: pytest.FixtureRequest) -> Trainer:
    """Either of the two."""
    found: Trainer = request.getfixturevalue(request.param)
    return found
