"""How hard tests search: a little in every run, and for hours where ``TEST_EFFORT=nightly`` (``make test-nightly``)."""

from __future__ import annotations

import os

NIGHTLY = os.environ.get("TEST_EFFORT") == "nightly"


def examples(each_run: int, nightly: int) -> int:
    """Random examples that a test tries."""
    return nightly if NIGHTLY else each_run


def scaled(whole: int, least: int = 1) -> int:
    """``whole``, of which ``TEST_SCALE`` (1 if it is not set) is tried, but never fewer than ``least``."""
    return max(least, round(whole * float(os.environ.get("TEST_SCALE", "1"))))
