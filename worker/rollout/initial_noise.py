"""The shapes that a pipeline's own initial noise leads to, for a check that most pipelines omit."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline

from ...protocol.errors import InvalidRequest
from ..crossing.call import Call
from ..crossing.chain import Chain, Proceed
from ..crossing.fork import Fork
from ..crossing.interceptors import shapes
from ..pipelines.components import DENOISERS


class _Reached(Exception):
    """Raised at the pipeline's first call of its denoiser."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


def usual_shapes(pipeline: DiffusionPipeline, arguments: dict[str, Any], seed: int) -> list[torch.Size]:
    """The shapes of the denoiser's arguments when the pipeline, called with ``arguments``, draws its own noise.

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
