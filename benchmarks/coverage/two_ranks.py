"""The same request on two tensor-parallel ranks, where there is a plan for the model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from diffusers import DiffusionPipeline

from safelight.protocol.config import Config
from safelight.worker.model.model import load_model
from safelight.worker.parallel.families import family_of
from safelight.worker.parallel.mesh import join, leave
from safelight.worker.pipelines.components import DENOISERS
from safelight.worker.requests.sample import first_output

from .row import TOLERANCE

DEGREE = 2
TIMEOUT_S = 60.0


def parallel(pipeline: DiffusionPipeline, checkpoint: str, arguments: dict[str, Any], expected: torch.Tensor) -> str:
    """``"yes"``, ``"no plan"``, or what two ranks could not do. ``expected`` is what one made of ``arguments``."""
    denoisers = [part for name, part in pipeline.components.items() if name in DENOISERS and part is not None]
    if not denoisers or any(family_of(type(part)) is None for part in denoisers):
        return "no plan"
    with tempfile.TemporaryDirectory() as directory:
        try:
            mp.start_processes(_rank, (checkpoint, arguments, directory), nprocs=DEGREE, start_method="fork")
        except mp.ProcessRaisedException as error:
            return str(error).strip().splitlines()[-1]
        found = torch.load(Path(directory) / "found.pt")
    worst = (found - expected).abs().max().item()
    return "yes" if worst <= TOLERANCE else f"differs by {worst:.0e}"


def made_plainly(pipeline: DiffusionPipeline, arguments: dict[str, Any]) -> torch.Tensor:
    """The plain pipeline's output; draws without a generator use the same seed."""
    torch.manual_seed(arguments["generator"].initial_seed())
    return first_output(pipeline(**arguments)).float()


def _rank(rank: int, checkpoint: str, arguments: dict[str, Any], directory: str) -> None:
    torch.set_grad_enabled(False)
    mesh = join(rank, {"tp": DEGREE}, f"{directory}/store", torch.device("cpu"), TIMEOUT_S)
    model = load_model(Config(model=checkpoint, device="cpu", tp=DEGREE), ranks=mesh.tp)
    found = made_plainly(model.pipeline, arguments)
    if rank == 0:
        torch.save(found, Path(directory) / "found.pt")
    leave(mesh)
