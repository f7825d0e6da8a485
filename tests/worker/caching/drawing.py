"""Draws requests on a batcher with options of forwards, beside plain diffusers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from safelight.protocol.generation import Generate
from safelight.worker.caching.caching import Caching
from safelight.worker.forward.batcher import Batcher
from safelight.worker.model.model import Model
from safelight.worker.requests.sample import SampleRun


def draw(
    model: Model,
    caching: Caching,
    requests: list[Generate],
    between: Callable[[list[SampleRun]], None] = lambda _: None,
) -> tuple[list[SampleRun], Batcher]:
    """Run ``requests`` together; ``between`` is called before each of the batcher's steps."""
    batcher = Batcher(max_batch=16, max_tokens=10**6)
    runs = [SampleRun(model, asked, 0, lambda *_: None, lambda _: None, caching=caching) for asked in requests]
    for sample in runs:
        batcher.start(sample.coroutine)
    while batcher.busy:
        between(runs)
        batcher.step()
    for sample in runs:
        if sample.coroutine.error is not None:
            raise sample.coroutine.error
    return runs, batcher


def difference(sample: SampleRun, expected: torch.Tensor) -> float:
    """The largest difference of a pixel."""
    return float((sample.coroutine.result - expected).abs().max())
