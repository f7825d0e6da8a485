"""The same request on two tensor-parallel ranks, where there is a plan for the model."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
import torch
import torch.multiprocessing as mp
from diffusers import DiffusionPipeline

from safelight.protocol.config import Config
from safelight.protocol.messages import Generate
from safelight.worker.model import load_model
from safelight.worker.models import family_of
from safelight.worker.parallel.ranks import join, leave
from safelight.worker.sample import SampleRun, first_output
from safelight.worker.sizes import DENOISERS

from .row import TOLERANCE

DEGREE = 2
TIMEOUT_S = 60.0


def parallel(pipeline: DiffusionPipeline, checkpoint: str, request: Generate, expected: torch.Tensor) -> str:
    """``"yes"``, ``"no plan"``, or what two ranks could not do. ``expected`` is what one gave."""
    denoisers = [part for name, part in pipeline.components.items() if name in DENOISERS and part is not None]
    if not denoisers or any(family_of(type(part)) is None for part in denoisers):
        return "no plan"
    with tempfile.TemporaryDirectory() as directory:
        arguments = (f"{directory}/store", checkpoint, msgspec.msgpack.encode(request), directory)
        try:
            mp.start_processes(_rank, arguments, nprocs=DEGREE, start_method="fork")
        except mp.ProcessRaisedException as error:
            return str(error).strip().splitlines()[-1]
        found = torch.load(Path(directory) / "found.pt")
    worst = (found - expected).abs().max().item()
    return "yes" if worst <= TOLERANCE else f"differs by {worst:.0e}"


def _rank(rank: int, store: str, checkpoint: str, request: bytes, directory: str) -> None:
    torch.set_grad_enabled(False)
    ranks = join(rank, DEGREE, store, torch.device("cpu"), TIMEOUT_S)
    model = load_model(Config(model=checkpoint, device="cpu", tp=DEGREE), ranks=ranks)
    run = SampleRun(model, msgspec.msgpack.decode(request, type=Generate), 0, lambda *_: None, lambda _: None)
    found = first_output(model.pipeline(**run.arguments())).float()
    if rank == 0:
        torch.save(found, Path(directory) / "found.pt")
    leave(ranks)
