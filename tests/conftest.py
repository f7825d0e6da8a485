"""What holds for every test."""

from __future__ import annotations

import os
import signal

from safelight.tests.effort import NIGHTLY

collect_ignore = [] if NIGHTLY else ["nightly"]


def pytest_configure() -> None:
    """One thread for torch's sums, as files of tests run beside each other; and Ctrl-C for what tests start.

    Processes of pytest-xdist ignore it, and what they start would too.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGINT, signal.default_int_handler)
