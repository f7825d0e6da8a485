"""Live servers of the tiny FLUX whose weights are updated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from safelight.tests.effort import chosen
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
    def serving(*flags: str, tp: int = 1, ulysses: int = 1) -> Iterator[Trainer]:
        ranks = ["--tp", str(tp), "--ulysses", str(ulysses)]
        with LiveServer(checkpoint, ["--threads", "1", *ranks, *flags]) as server:
            server.wait_ready()
            trainer = Trainer(server, checkpoint, tp * ulysses)
            trainer.wait_all_ready()
            yield trainer

    return serving


@pytest.fixture(scope="session")
def _alone(serve: Serve) -> Iterator[Trainer]:
    with serve() as trainer:
        yield trainer


@pytest.fixture(scope="session")
def _divided(serve: Serve) -> Iterator[Trainer]:
    with serve("--replicas", "2", "--fuse-projections", tp=2) as trainer:
        yield trainer


@pytest.fixture(scope="module")
def alone(_alone: Trainer) -> Trainer:
    """One replica of one rank; tests leave its weights as they were, unless they are their module's last."""
    _alone.restore()
    return _alone


@pytest.fixture(scope="module")
def divided(_divided: Trainer) -> Trainer:
    """Two replicas of two ranks each, projections fused."""
    _divided.restore()
    return _divided


@pytest.fixture(scope="session")
def _split(serve: Serve) -> Iterator[Trainer]:
    with serve(ulysses=2) as trainer:
        yield trainer


@pytest.fixture(scope="module")
def split(_split: Trainer) -> Trainer:
    """One replica of two ranks with the same weights, which share tokens."""
    _split.restore()
    return _split


@pytest.fixture(scope="module", params=chosen("divided", nightly=["alone", "split"]))
def trainer(request: pytest.FixtureRequest) -> Trainer:
    """One of the three; what holds on ranks and replicas holds on one."""
    found: Trainer = request.getfixturevalue(request.param)
    return found
