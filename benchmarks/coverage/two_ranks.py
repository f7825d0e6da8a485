"""The same request on two tensor-parallel ranks, where there is a plan for the model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from diffusers import DiffusionPipeline
from torch import nn

from safelight.protocol.config import Config
from safelight.worker.model.model import load_model
from safelight.worker.parallel.families import family_of
from safelight.worker.parallel.mesh import join, leave
from safelight.worker.pipelines.components import DENOISERS
from safelight.worker.requests.outputs import first_output

from .row import AMPLIFIED, TOLERANCE

DEGREE = 2
TIMEOUT_S = 60.0
EXACT = 1e-6
"""Largest difference in float64, of outputs that are then rounded to float32."""


def parallel(pipeline: DiffusionPipeline, checkpoint: str, arguments: dict[str, Any], expected: torch.Tensor) -> str:
    """``"yes"``, ``"no plan"``, or what two ranks could not do. ``expected`` is what one made of ``arguments``.

    Where the outputs differ, both are made again in float64: a wrong division differs there as well, and rounding that
    a pipeline amplifies does not. ``pipeline`` is float64 then.
    """
    denoisers = [part for name, part in pipeline.components.items() if name in DENOISERS and part is not None]
    if not denoisers or any(family_of(type(part)) is None for part in denoisers):
        return "no plan"
    try:
        worst = _difference(_on_two_ranks(checkpoint, arguments, in_float64=False), expected)
        if worst <= TOLERANCE:
            return "yes"
        found = _on_two_ranks(checkpoint, arguments, in_float64=True)
    except mp.ProcessRaisedException as error:
        return str(error).strip().splitlines()[-1]
    _to_float64(pipeline)
    exact = _difference(found, made_plainly(pipeline, arguments)) <= EXACT
    return f"{AMPLIFIED}{worst:.0e}" if exact else f"differs by {worst:.0e}"


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def _on_two_ranks(checkpoint: str, arguments: dict[str, Any], *, in_float64: bool) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as directory:
        given = (checkpoint, arguments, directory, in_float64)
        mp.start_processes(_rank, given, nprocs=DEGREE, start_method="fork")
        found: torch.Tensor = torch.load(Path(directory) / "found.pt")
    return found


def _to_float64(pipeline: DiffusionPipeline) -> None:
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.double()


def made_plainly(pipeline: DiffusionPipeline, arguments: dict[str, Any]) -> torch.Tensor:
    """The plain pipeline's output; draws without a generator use the same seed."""
    torch.manual_seed(arguments["generator"].initial_seed())
    return first_output(pipeline(**arguments)).float()


def _rank(rank: int, checkpoint: str, arguments: dict[str, Any], directory: str, in_float64: bool) -> None:
    torch.set_grad_enabled(False)
    mesh = join(rank, {"tp": DEGREE}, f"{directory}/store", torch.device("cpu"), TIMEOUT_S)
    model = load_model(Config(model=checkpoint, device="cpu", tp=DEGREE), ranks=mesh.tp)
    if in_float64:
        _to_float64(model.pipeline)
    found = made_plainly(model.pipeline, arguments)
    if rank == 0:
        torch.save(found, Path(directory) / "found.pt")
    leave(mesh)
