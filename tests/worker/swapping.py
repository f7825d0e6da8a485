"""A pipeline that writes to its components, on every rank; in a module that ranks' processes can import."""

from __future__ import annotations

from pathlib import Path

import torch
from msgspec.structs import replace

from safelight.protocol.config import Config
from safelight.protocol.generation import Generate
from safelight.tests.worker.lora.agreement import request
from safelight.worker.forward.batcher import Batcher
from safelight.worker.model.model import Model, load_model
from safelight.worker.parallel.ranks import Ranks
from safelight.worker.requests.outputs import first_output
from safelight.worker.requests.sample import SampleRun

FAMILY = "sd3_pag"


def requests() -> list[Generate]:
    """One whose pipeline swaps processors, and one whose does not."""
    usual = request(FAMILY, 1)
    return [request(FAMILY, 0), replace(usual, extra=usual.extra | {"pag_scale": 0.0})]


def run_of(model: Model, asked: Generate) -> SampleRun:
    return SampleRun(model, asked, 0, lambda *_: None, lambda _: None)


def references(checkpoint: Path) -> list[torch.Tensor]:
    """The picture that plain diffusers draws."""
    model = load_model(Config(model=str(checkpoint), device="cpu"))
    return [first_output(model.pipeline(**run_of(model, asked).arguments())) for asked in requests()]


def cancelled_and_drawn(ranks: Ranks, checkpoint: Path, expected: list[torch.Tensor]) -> None:
    """A request ends in the middle on every rank; those after it are as plain diffusers draws them."""
    config = Config(model=str(checkpoint), device="cpu", tp=ranks.size)
    model, batcher = load_model(config, torch.device("cpu"), ranks), Batcher(max_batch=4, max_tokens=10**6)
    doomed = run_of(model, requests()[0])
    batcher.start(doomed.coroutine)
    for _ in range(6):
        batcher.step()
    batcher.cancel(doomed.coroutine)
    runs = [run_of(model, asked) for asked in requests()]
    for run in runs:
        batcher.start(run.coroutine)
    while batcher.busy:
        batcher.step()
    for run, picture in zip(runs, expected, strict=True):
        assert torch.allclose(run.coroutine.result, picture, atol=1e-5), run.coroutine.error
