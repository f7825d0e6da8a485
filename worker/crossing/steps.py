"""Denoising steps, observed at the scheduler's ``step``, which every pipeline calls."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from msgspec import Struct

_WATCHED = ("model_output", "timestep", "sample")
"""The arguments of ``step`` that :class:`DenoisingStep` reports, at any position in its signature."""


class DenoisingStep(Struct, frozen=True, eq=False):
    """The ``number``-th of ``total`` steps, from ``sample`` to ``prev_sample`` by ``model_output``.

    ``index`` is its index in the scheduler's timesteps, ``result`` the scheduler's return value.
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
        """The denoised sample x0 as this step estimates it, or the next sample if there is no estimate."""
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
    scheduler: SchedulerMixin, on_step: Callable[[DenoisingStep], None], take_step: Callable[..., Any] | None = None
) -> None:
    """Call ``on_step`` after each step of ``scheduler``, a fork's own copy. ``take_step`` replaces its ``step``.

    Not observed are the steps of copies that the pipeline makes (for a second modality), and of schedulers whose
    ``step`` has other arguments than a sample at a timestep or does not return a tensor.
    """
    own_step = types.MethodType(type(scheduler).step, scheduler)
    watched = _watched(type(scheduler).step)
    if watched is None:
        assert take_step is None, "only flow-matching schedulers have their step replaced"
        return
    take = take_step or own_step
    number = first = 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal number, first
        model_output, timestep, sample = [argument.of(args, kwargs) for argument in watched]
        if number == 0:
            first = first_index(scheduler, timestep)
        result = take(*args, **kwargs)
        reached = _reached(result)
        if reached is not None:
            number += 1
            total = len(scheduler.timesteps) - first
            on_step(DenoisingStep(number, total, first + number - 1, scheduler, model_output, sample, reached, result))
        return result

    _replace_step(scheduler, step)


@dataclass(frozen=True, slots=True)
class _Argument:
    """An argument of ``step``: its position after the scheduler, and its default, if it has one."""

    name: str
    position: int
    default: Any

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.position < len(args):
            return args[self.position]
        if self.name not in kwargs and self.default is inspect.Parameter.empty:
            raise TypeError(f"a scheduler's step was called without {self.name}")
        return kwargs.get(self.name, self.default)


@functools.cache
def _watched(step: Callable[..., Any]) -> tuple[_Argument, ...] | None:
    """The watched arguments of ``step``, in the order of their list; ``None`` if it does not have all of them."""
    parameters = inspect.signature(step).parameters
    if not set(_WATCHED) <= parameters.keys():
        return None
    positions = {name: index - 1 for index, name in enumerate(parameters)}
    return tuple(_Argument(name, positions[name], parameters[name].default) for name in _WATCHED)


def _reached(result: Any) -> torch.Tensor | None:
    """The next sample in the return value of ``step``, if it has the form of diffusers' schedulers."""
    first = result[0] if isinstance(result, tuple) and result else getattr(result, "prev_sample", None)
    return first if isinstance(first, torch.Tensor) else None


def first_index(scheduler: SchedulerMixin, timestep: Any) -> int:
    """The schedule's index of a call's first step; image-to-image pipelines skip some steps.

    Pipelines iterate over the schedule's own timesteps, whose addresses say which one it is. The values of any other
    timestep are compared, for which the host waits if they are on a GPU.
    """
    timesteps = scheduler.timesteps
    if isinstance(timestep, torch.Tensor) and timestep.numel():
        timestep = timestep[(0,) * timestep.ndim]
        if isinstance(timesteps, torch.Tensor) and _shares_memory(timestep, timesteps):
            offset: int = timestep.storage_offset() - timesteps.storage_offset()
            return offset // timesteps.stride(0)
    found = (timesteps == timestep).nonzero()
    return int(found[0]) if len(found) else 0


def _shares_memory(element: torch.Tensor, whole: torch.Tensor) -> bool:
    return (
        element.dtype == whole.dtype
        and whole.ndim == 1
        and whole.stride(0) > 0
        and element.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    )


def answer_steps(scheduler: SchedulerMixin, sample: torch.Tensor) -> None:
    """Make every step of ``scheduler`` return ``sample``. Copies of the scheduler step as usual.

    A tuple has two elements, the next and the clean sample; most pipelines read only the first.
    """

    def step(*_: Any, **kwargs: Any) -> Any:
        return _Arrived(sample, sample) if kwargs.get("return_dict", True) else (sample, sample)

    _replace_step(scheduler, step)


def _replace_step(scheduler: SchedulerMixin, step: Callable[..., Any]) -> None:
    """Replace the ``step`` of ``scheduler``, keeping its name and signature.

    On the instance and not by a subclass, because some pipelines test ``type(scheduler) is …``.
    """
    vars(scheduler)["step"] = _Replaced(scheduler, step)


class _Replaced:
    """A step of one scheduler: a deep copy of the scheduler has its class's own step again.

    A copy of the scheduler's attributes alone, however, keeps this step, because it is restored to the same scheduler.
    """

    def __init__(self, scheduler: SchedulerMixin, step: Callable[..., Any]) -> None:
        functools.update_wrapper(self, types.MethodType(type(scheduler).step, scheduler))
        self._scheduler = scheduler
        self._step = step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._scheduler))  # deepcopy registers a copy before it copies the attributes
        return self if copied is None else types.MethodType(type(copied).step, copied)


@dataclass(frozen=True, slots=True)
class _Arrived:
    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor
