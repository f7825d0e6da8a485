"""A decoded preview of an unfinished sample, made by the pipeline's own code.

The pipeline is called again for a single step, in which the denoiser answers with zeros and the scheduler returns the
sample's current estimate. The rest of the pipeline (unpacking, scaling, decoding) treats it like its own latents.
"""

from __future__ import annotations

from typing import Any

import torch

from ..crossing.chain import Chain
from ..crossing.fork import Fork, schedulers
from ..crossing.interceptors import without_denoiser
from ..crossing.steps import answer_steps
from ..model.pipeline_task import PipelineTask
from .outputs import first_output

_SCHEDULE = ("num_inference_steps", "timesteps", "sigmas")


def preview(
    task: PipelineTask, arguments: dict[str, Any], latents: torch.Tensor, *, watches_all: bool = False
) -> torch.Tensor:
    """The picture [C, H, W] or clip [F, C, H, W] that ``latents`` decode to, float in [0, 1].

    Runs in the caller's coroutine, so that only the sample itself waits for its previews. ``arguments`` are those of
    the sample's call; ``latents`` have the form that its scheduler's ``step`` returns. ``watches_all`` is the fork's.
    """
    once = {name: value for name, value in arguments.items() if name not in _SCHEDULE}
    if "strength" in task.arguments:
        once["strength"] = 1.0  # a lower strength would skip the only step
    with Fork(task.pipeline, Chain([without_denoiser]), watches_all=watches_all) as pipeline:
        for scheduler in schedulers(pipeline):
            answer_steps(scheduler, latents)
        return first_output(pipeline(**once, num_inference_steps=1))
