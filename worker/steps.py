"""Denoising steps, seen at the one place where every pipeline takes them: its scheduler's ``step``."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

_WATCHED = ("model_output", "timestep", "sample")
"""The arguments of a step that are told of it, wherever they stand in its signature."""


@dataclass(frozen=True, slots=True)
class Step:
    """The ``number``-th of ``total`` steps was taken: from ``sample`` to ``prev_sample`` by ``model_output``.

    It stands at ``index`` in the scheduler's timesteps; ``result`` is what the scheduler returned.
    """

    number: int
    total: int
    index: int
    scheduler: SchedulerMixin
    model_output: torch.Tensor
    sample: torch.Tensor
    prev_sample: torch.Tensor
    result: Any

    def clean_estimate(self) -> torch.Tensor:
        """What the sample would be without its noise, as far as this step knows: x0, or else the next sample."""
        estimate = getattr(self.result, "pred_original_sample", None)
        if isinstance(estimate, torch.Tensor):
            return estimate
        sigmas = getattr(self.scheduler, "sigmas", None)
        flow = type(self.scheduler).__name__.startswith("FlowMatch")
        alike = self.model_output.shape == self.sample.shape
        if flow and alike and sigmas is not None and self.index < len(sigmas) - 1:
            sigma: torch.Tensor = sigmas[self.index].to(self.sample.device)
            return self.sample - sigma * self.model_output
        return self.prev_sample


def watch_steps(
    scheduler: SchedulerMixin, seen: Callable[[Step], None], take_step: Callable[..., Any] | None = None
) -> None:
    """Call ``seen`` after each step of ``scheduler``, which must be a fork's own copy; ``take_step`` takes them.

    A copy that the pipeline makes of it (for a second modality, say) takes its own steps, unseen. So does a scheduler
    whose step goes by other arguments than from a sample at a timestep, or to something else than a tensor.
    """
    own_step = types.MethodType(type(scheduler).step, scheduler)
    signature = inspect.signature(own_step)
    if not set(_WATCHED) <= signature.parameters.keys():
        assert take_step is None, "only schedulers of flows are told how to step"
        return
    take = take_step or own_step
    number = first = 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal number, first
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        model_output, timestep, sample = (given.arguments[name] for name in _WATCHED)
        if number == 0:
            first = first_index(scheduler, timestep)
        result = take(*args, **kwargs)
        reached = _reached(result)
        if reached is not None:
            number += 1
            total = len(scheduler.timesteps) - first
            seen(Step(number, total, first + number - 1, scheduler, model_output, sample, reached, result))
        return result

    _replace_step(scheduler, step)


def _reached(result: Any) -> torch.Tensor | None:
    """The next sample, if a step has returned one in the way of diffusers' schedulers."""
    first = result[0] if isinstance(result, tuple) and result else getattr(result, "prev_sample", None)
    return first if isinstance(first, torch.Tensor) else None


def first_index(scheduler: SchedulerMixin, timestep: Any) -> int:
    """Where the first step of a call stands in the schedule: going on from an image, a pipeline begins further on."""
    if isinstance(timestep, torch.Tensor) and timestep.ndim > 0:
        timestep = timestep.flatten()[0]
    found = (scheduler.timesteps == timestep).nonzero()
    return int(found[0]) if len(found) else 0


def answer_steps(scheduler: SchedulerMixin, sample: torch.Tensor) -> None:
    """Make every step of ``scheduler`` arrive at ``sample``, whatever it is given. Copies of it step as ever.

    A tuple has the clean sample behind the next one, as some pipelines ask for it; others take the first alone.
    """

    def step(*_: Any, **kwargs: Any) -> Any:
        return _Arrived(sample, sample) if kwargs.get("return_dict", True) else (sample, sample)

    _replace_step(scheduler, step)


def _replace_step(scheduler: SchedulerMixin, step: Callable[..., Any]) -> None:
    """Let ``scheduler`` take its steps by ``step``, which looks like its own in name and signature.

    On the instance and not by another class, as some pipelines ask ``type(scheduler) is …``.
    """
    vars(scheduler)["step"] = _Replaced(scheduler, step)


class _Replaced:
    """A step that belongs to one scheduler alone: a deep copy of the scheduler has its class's own again.

    A copy of the scheduler's attributes alone is a state that it will be given back, with this step.
    """

    def __init__(self, scheduler: SchedulerMixin, step: Callable[..., Any]) -> None:
        functools.update_wrapper(self, types.MethodType(type(scheduler).step, scheduler))
        self._scheduler = scheduler
        self._step = step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._scheduler))  # a copy is known by its original's id before its attributes are made
        return self if copied is None else types.MethodType(type(copied).step, copied)


@dataclass(frozen=True, slots=True)
class _Arrived:
    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor
