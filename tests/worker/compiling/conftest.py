"""Each test of compilation begins without graphs."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    trace = logging.getLogger("torch.__trace")  # pytest would format every step of the compiler
    trace.propagate = False
    yield
    trace.propagate = True
    torch._dynamo.reset()
