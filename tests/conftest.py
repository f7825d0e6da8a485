"""What holds for every test."""

from __future__ import annotations

import os
import signal

from safelight.tests.effort import NIGHTLY

ON_DEVICE = "TEST_DEVICE" in os.environ
collect_ignore = [*([] if NIGHTLY else ["nightly"]), *([] if ON_DEVICE else ["cuda"])]
if not ON_DEVICE:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these tests compare with what plain diffusers computes on a CPU


def pytest_configure() -> None:
    """One thread for torch's sums, as files of tests run beside each other; and Ctrl-C for what tests start.

    Processes of pytest-xdist ignore it, and what they start would too.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGINT, signal.default_int_handler)
