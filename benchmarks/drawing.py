"""Requests drawn in this process: a loaded model, and a batcher as a worker has it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from safelight.protocol.config import Config
from safelight.protocol.forward_options import ForwardOptions
from safelight.protocol.generation import Generate
from safelight.worker.caching.caching import Caching
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.prompt_cache import PromptCache
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.model.model import Model, load_model
from safelight.worker.requests.sample import SampleRun


@dataclass(frozen=True)
class Drawn:
    """Outputs in the order of their requests, CPU and wall seconds, and rows of the denoiser that were not computed."""

    outputs: list[torch.Tensor]
    cpu_s: float
    wall_s: float
    encode_s: float
    """From the start of the first request to its first denoising step."""
    skipped: int
    forwards: int


def loaded(directory: Path) -> Model:
    return load_model(Config(model=str(directory), device="cpu", dtype="float32"))


def draw(
    model: Model,
    requests: Sequence[Generate],
    options: ForwardOptions,
    cache: PromptCache | None = None,
    *,
    together: int = 16,
    caching: Caching | None = None,
) -> Drawn:
    """Draw ``requests``, ``together`` at a time. Raises what a request raises."""
    caching = caching or Caching(options, {})
    runs: list[SampleRun] = []
    cpu, wall, forwards = time.process_time(), time.perf_counter(), 0
    for start in range(0, len(requests), together):
        batcher = Batcher(max_batch=16, max_tokens=10**6, resources=ForwardResources(cache=cache))
        part = [
            SampleRun(model, request, 0, lambda *_: None, lambda _: None, caching=caching)
            for request in requests[start : start + together]
        ]
        for run in part:
            batcher.start(run.coroutine)
        while batcher.busy:
            batcher.step()
        runs += part
        forwards += batcher.runner.counters.forwards
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    for run in runs:
        if run.coroutine.error is not None:
            raise run.coroutine.error
    clock = runs[0].clock
    encode_s = (clock.first_denoise or 0.0) - (clock.started or 0.0)
    skipped = sum(run.savings.skipped for run in runs)
    return Drawn([run.coroutine.result for run in runs], cpu, wall, encode_s, skipped, forwards)
