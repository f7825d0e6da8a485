"""The keyword arguments of a pipeline's call for one sample of a request."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ...protocol.fields import ARGUMENTS
from ...protocol.generation import Generate
from ...protocol.rollouts import Rollout
from ..model.model import Model
from ..pipelines.arguments import as_declared
from ..rollout.record import read_tensor
from .input_images import image_arguments


def sample_arguments(model: Model, request: Generate, index: int) -> dict[str, Any]:
    """The arguments of sample ``index``, with a fresh generator. Raises ``InvalidRequest``."""
    task, sample = model.task(request), request.samples[index]
    given = {name: getattr(request, name) for name in ARGUMENTS if getattr(request, name) is not None}
    if request.fps is not None and "frame_rate" in task.arguments:
        given["frame_rate"] = request.fps
    if task.takes_prompt:
        given["prompt"] = sample.prompt
    defaults = task.plain_defaults if request.deterministic else task.defaults
    if request.images:
        defaults, given = _without_size(defaults), _without_size(given) | image_arguments(task, request)
    rollout = request.rollout
    device = model.device if rollout is not None and rollout.generator_device == "cuda" else "cpu"
    own = copy.deepcopy(request.extra)  # a pipeline may write to it
    return {
        **as_declared(task.arguments, defaults | given | own),
        **({} if rollout is None else _rollout_arguments(rollout, index, model.device)),
        "generator": torch.Generator(device).manual_seed(sample.seed),
        "output_type": task.output_type,
    }


def _rollout_arguments(rollout: Rollout, index: int, device: torch.device) -> dict[str, Any]:
    """The arguments for a rollout's schedule and initial noise."""
    given: dict[str, Any] = {}
    if rollout.sigmas is not None:
        given["num_inference_steps"] = sum(sigma > 0 for sigma in rollout.sigmas)
    if rollout.initial_noise:
        noise = rollout.initial_noise[index if len(rollout.initial_noise) > 1 else 0]
        given["latents"] = read_tensor(noise).to(device)
    return given


def _without_size(given: dict[str, Any]) -> dict[str, Any]:
    """``given`` without the sides, which follow from the images."""
    return {name: value for name, value in given.items() if name not in ("width", "height")}
