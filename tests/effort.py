"""How hard tests search: a little in every run, and for hours where ``TEST_EFFORT=nightly`` (``make test-nightly``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

NIGHTLY = os.environ.get("TEST_EFFORT") == "nightly"


def examples(each_run: int, nightly: int) -> int:
    """Random examples that a test tries."""
    return nightly if NIGHTLY else each_run


def chosen(*each_run: T, nightly: Sequence[T] = ()) -> list[T]:
    """Parameters of a test: some in each run, and further ones of their kind every night."""
    return [*each_run, *(nightly if NIGHTLY else ())]


def scaled(whole: int, least: int = 1) -> int:
    """``whole`` times ``TEST_SCALE`` (default 1), but at least ``least``."""
    return max(least, round(whole * float(os.environ.get("TEST_SCALE", "1"))))
