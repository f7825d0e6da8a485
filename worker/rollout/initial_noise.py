"""Whether initial noise is of the shape that a pipeline draws itself, which most pipelines do not look at."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.utils import _pytree as pytree

from ...protocol.errors import InvalidRequest
from ..call import Call, cross
from ..fork import Fork
from ..sizes import DENOISERS


class _Reached(Exception):
    """A pipeline has come to its denoiser's first call."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


def usual_shapes(pipeline: DiffusionPipeline, arguments: dict[str, Any], seed: int) -> list[torch.Size]:
    """Those of the denoiser's arguments with noise of the pipeline's own; ``arguments`` are the call's.

    Raises ``InvalidRequest`` for a pipeline without a denoiser.
    """

    def until_denoiser(call: Call) -> Any:
        if call.name in DENOISERS:
            raise _Reached(call)
        return cross(call)

    generator = torch.Generator(arguments["generator"].device).manual_seed(seed)
    given = {name: value for name, value in arguments.items() if name != "latents"}
    try:
        with Fork(pipeline, until_denoiser) as forked:
            forked(**given | {"generator": generator})
    except _Reached as reached:
        return shapes(reached.call)
    raise InvalidRequest("This pipeline takes no initial noise.", field="initial_noise")


def shapes(call: Call) -> list[torch.Size]:
    return [leaf.shape for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, torch.Tensor)]
