"""How hard tests search: a little in every run, and for hours where ``TEST_EFFORT=nightly`` (``make test-nightly``)."""

from __future__ import annotations

import os

NIGHTLY = os.environ.get("TEST_EFFORT") == "nightly"


def examples(each_run: int, nightly: int) -> int:
    """Random examples that a test tries."""
    return nightly if NIGHTLY else each_run
