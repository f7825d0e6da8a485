"""Whether initial noise is of the shape that a pipeline draws itself, which most pipelines do not look at."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline

from ...protocol.errors import InvalidRequest
from ..crossing.call import Call
from ..crossing.chain import Chain, Proceed
from ..crossing.fork import Fork
from ..crossing.interceptors import shapes
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

    def until_denoiser(call: Call, proceed: Proceed) -> Any:
        if call.name in DENOISERS:
            raise _Reached(call)
        (answer,) = proceed(call)
        return answer

    generator = torch.Generator(arguments["generator"].device).manual_seed(seed)
    given = {name: value for name, value in arguments.items() if name != "latents"}
    try:
        with Fork(pipeline, Chain([until_denoiser])) as forked:
            forked(**given | {"generator": generator})
    except _Reached as reached:
        return shapes(reached.call)
    raise InvalidRequest("This pipeline takes no initial noise.", field="initial_noise")
