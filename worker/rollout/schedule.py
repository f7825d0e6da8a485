"""A requested schedule in place of the pipeline's own."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ...protocol.errors import InvalidRequest
from ..crossing.fork import schedulers


def shift(pipeline: DiffusionPipeline, flow_shift: float) -> None:
    """Give ``pipeline``, a fork, schedulers with this shift.

    Raises ``InvalidRequest`` if none of its schedulers has a fixed shift.
    """
    found = {
        name: (component, key)
        for name, component in pipeline.components.items()
        if isinstance(component, SchedulerMixin) and (key := _shift_of(component)) is not None
    }
    if not found:
        names = ", ".join(type(scheduler).__name__ for scheduler in schedulers(pipeline))
        raise InvalidRequest(
            f"The schedule of this model ({names}) is not shifted by a number; leave flow_shift out.",
            field="flow_shift",
        )
    for name, (scheduler, key) in found.items():
        # not setattr: the pipeline's would write the change into the configuration, which all forks share
        vars(pipeline)[name] = type(scheduler).from_config(scheduler.config, **{key: flow_shift})


def _shift_of(scheduler: SchedulerMixin) -> str | None:
    """The name of the scheduler's argument for the shift, if it has an effect."""
    config = scheduler.config
    if config.get("use_dynamic_shifting"):
        return None
    if config.get("use_flow_sigmas") and "flow_shift" in config:
        return "flow_shift"
    return "shift" if "shift" in config else None


def follow(scheduler: SchedulerMixin, sigmas: list[float]) -> None:
    """Make ``scheduler`` use exactly ``sigmas`` and a final 0, whatever the pipeline passes to ``set_timesteps``."""
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def set_ours(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        every = [*sigmas, *([0.0] if sigmas[-1] > 0 else [])]
        scheduler.sigmas = torch.tensor(every, dtype=torch.float32, device=scheduler.sigmas.device)
        steps = scheduler.sigmas[:-1] * scheduler.config.num_train_timesteps
        scheduler.timesteps = steps.to(scheduler.timesteps.device)
        scheduler.num_inference_steps = len(steps)

    vars(scheduler)["set_timesteps"] = set_ours
