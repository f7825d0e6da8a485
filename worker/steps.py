"""Denoising steps, seen at the one place where every pipeline takes them: its scheduler's ``step``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin


@dataclass(frozen=True, slots=True)
class Step:
    """The ``number``-th of ``total`` steps was taken: from ``sample`` to ``prev_sample`` by ``model_output``."""

    number: int
    total: int
    scheduler: SchedulerMixin
    model_output: torch.Tensor
    sample: torch.Tensor
    result: Any

    @property
    def prev_sample(self) -> torch.Tensor:
        sample: torch.Tensor
        sample = self.result[0] if isinstance(self.result, tuple) else self.result.prev_sample
        return sample

    def clean_estimate(self) -> torch.Tensor:
        """What the sample would be without its noise, as far as this step knows: x0, or else the next sample."""
        estimate = getattr(self.result, "pred_original_sample", None)
        if isinstance(estimate, torch.Tensor):
            return estimate
        sigmas = getattr(self.scheduler, "sigmas", None)
        index = self.number - 1 + _skipped(self.scheduler)
        flow = type(self.scheduler).__name__.startswith("FlowMatch")
        if flow and sigmas is not None and index < len(sigmas) - 1 and self.model_output.shape == self.sample.shape:
            sigma: torch.Tensor = sigmas[index].to(self.sample.device)
            return self.sample - sigma * self.model_output
        return self.prev_sample


def watch_steps(scheduler: SchedulerMixin, seen: Callable[[Step], None]) -> None:
    """Call ``seen`` after each step of ``scheduler``, which must be a fork's own copy.

    A copy that the pipeline makes of it (for a second modality, say) takes its own steps, unseen.
    """
    number = 0
    take_step = type(scheduler).step

    def step(
        watched: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kw: Any
    ) -> Any:
        nonlocal number
        result = take_step(watched, model_output, timestep, sample, *args, **kw)
        if watched is scheduler:
            number += 1
            seen(Step(number, len(scheduler.timesteps) - _skipped(scheduler), scheduler, model_output, sample, result))
        return result

    _replace_step(scheduler, step)


def _skipped(scheduler: SchedulerMixin) -> int:
    """Steps at the front of the schedule that are not taken: going on from an image, a pipeline begins further on."""
    return getattr(scheduler, "begin_index", None) or 0


def answer_steps(scheduler: SchedulerMixin, sample: torch.Tensor) -> None:
    """Make every step of ``scheduler`` arrive at ``sample``, whatever it is given. Copies of it step as ever."""
    take_step = type(scheduler).step

    def step(answering: Any, *args: Any, **kwargs: Any) -> Any:
        if answering is not scheduler:
            return take_step(answering, *args, **kwargs)
        return _Arrived(sample, sample) if kwargs.get("return_dict", True) else (sample,)

    _replace_step(scheduler, step)


def _replace_step(scheduler: SchedulerMixin, step: Callable[..., Any]) -> None:
    """Give ``scheduler`` a class of its own with another ``step``, alike in name and signature, which pipelines read.

    The class and not the instance: a function kept on the instance would go along into a deep copy, and there still
    step the original.
    """
    base = type(scheduler)
    scheduler.__class__ = type(base.__name__, (base,), {"step": functools.wraps(base.step)(step)})


@dataclass(frozen=True, slots=True)
class _Arrived:
    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor
