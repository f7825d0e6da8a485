"""Fixtures and limits of every test."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from xdist.scheduler import LoadGroupScheduling

from safelight.tests.effort import NIGHTLY

if TYPE_CHECKING:
    from safelight.tests.serving import Servers

ON_DEVICE = "TEST_DEVICE" in os.environ
collect_ignore = [*([] if NIGHTLY else ["nightly"]), *([] if ON_DEVICE else ["cuda"])]
if not ON_DEVICE:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these tests compare with what plain diffusers computes on a CPU


def pytest_configure(config: pytest.Config) -> None:
    """One thread for torch's sums, as files of tests run beside each other; and Ctrl-C for what tests start.

    Processes of pytest-xdist ignore it, and what they start would too. Servers of a run share their caches. Each
    ``httpx.get`` reads all certificates that it finds, which takes 30 ms; no test speaks TLS.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.pop("SSL_CERT_FILE", None)
    os.environ["SSL_CERT_DIR"] = os.devnull
    if not hasattr(config, "workerinput"):
        caches = tempfile.TemporaryDirectory(prefix="caches-of-tests-")
        config.add_cleanup(caches.cleanup)
        os.environ["XDG_CACHE_HOME"] = caches.name


class _ByFileOrGroup(LoadGroupScheduling):
    """Tests of a file run in one process, one after the other, and so do those of an ``xdist_group``."""

    def _split_scope(self, nodeid: str) -> str:
        scope: str = super()._split_scope(nodeid)
        return scope.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadGroupScheduling:
    return _ByFileOrGroup(config, log)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for torch, as ranks of these tests have: sums of products depend on it, and tiny ones are faster."""
    import torch  # which many tests do without

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def like_a_rank(one_thread: None) -> Iterator[None]:
    """One thread, and gradients off, as in a rank's process."""
    import torch

    with torch.no_grad():
        yield


@pytest.fixture
def rendezvous_path() -> Iterator[str]:
    """Short, as a socket's path has a limit."""
    with tempfile.TemporaryDirectory() as directory:
        yield f"{directory}/start-0"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's tiny checkpoint."""
    from safelight.tests.tiny import save  # imports torch, which many tests do without

    directory: Path = tmp_path_factory.mktemp("tiny")
    return lambda name: save(name, directory)


@pytest.fixture(scope="session")
def servers(checkpoint: Callable[[str], Path]) -> Iterator[Servers]:
    """Servers that tests share, by family and flags."""
    from safelight.tests.serving import Servers

    found = Servers(checkpoint)
    yield found
    found.stop()
