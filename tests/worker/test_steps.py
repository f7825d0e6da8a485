"""Steps are seen where they are taken, and only there."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers import CogVideoXDPMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from safelight.worker.crossing.steps import DenoisingStep, answer_steps, first_index, watch_steps

UNSEEN = {"KarrasVeScheduler"}
"""Schedulers whose steps go from a sigma to the next, and know no timestep."""


def flow(steps: int = 4) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    return scheduler


def test_a_deep_copy_of_a_watched_scheduler_takes_its_own_steps_unseen() -> None:
    seen: list[DenoisingStep] = []
    scheduler = flow()
    watch_steps(scheduler, seen.append)
    other = copy.deepcopy(scheduler)
    sample = torch.ones(1, 4)
    other.step(sample, other.timesteps[0], sample)
    other.step(sample, other.timesteps[1], sample)
    assert (other.step_index, scheduler.step_index, len(seen)) == (2, None, 0)
    scheduler.step(sample, scheduler.timesteps[0], sample)
    assert (scheduler.step_index, [(step.number, step.total) for step in seen]) == (1, [(1, 4)])


def test_pipelines_still_find_the_signature_and_the_name_that_they_look_for() -> None:
    scheduler = DDIMScheduler()
    before = inspect.signature(scheduler.step)
    watch_steps(scheduler, lambda _: None)
    assert inspect.signature(scheduler.step) == before
    assert scheduler.step.__name__ == "step"
    assert type(scheduler) is DDIMScheduler


def test_a_saved_state_that_a_pipeline_gives_back_is_still_watched() -> None:
    seen: list[DenoisingStep] = []
    scheduler, sample = flow(), torch.ones(1, 4)
    watch_steps(scheduler, seen.append)
    state = copy.deepcopy(vars(scheduler))
    scheduler.step(sample, scheduler.timesteps[0], sample)
    vars(scheduler).update(state)
    scheduler.step(sample, scheduler.timesteps[0], sample)
    assert [step.number for step in seen] == [1, 2]
    assert scheduler.step_index == 1


def test_a_copy_of_an_answering_scheduler_steps_as_ever() -> None:
    scheduler = flow()
    answer_steps(scheduler, torch.full((1, 4), 7.0))
    other, sample = copy.deepcopy(scheduler), torch.ones(1, 4)
    assert torch.equal(
        other.step(sample, other.timesteps[0], sample).prev_sample,
        flow().step(sample, other.timesteps[0], sample).prev_sample,
    )


def test_the_clean_estimate_of_a_flow_is_where_its_straight_line_ends() -> None:
    seen: list[DenoisingStep] = []
    scheduler = flow()
    watch_steps(scheduler, seen.append)
    clean, noise = torch.full((1, 4), 0.3), torch.randn(1, 4)
    sigma = scheduler.sigmas[0]
    scheduler.step(noise - clean, scheduler.timesteps[0], sigma * noise + (1 - sigma) * clean)
    assert torch.allclose(seen[0].clean_estimate(), clean, atol=1e-6)


def test_an_answering_scheduler_returns_its_sample_in_both_return_forms() -> None:
    scheduler, goal = flow(), torch.full((1, 4), 7.0)
    answer_steps(scheduler, goal)
    sample = torch.zeros(1, 4)
    assert scheduler.step(sample, scheduler.timesteps[0], sample, return_dict=False)[0] is goal
    assert scheduler.step(sample, scheduler.timesteps[0], sample).prev_sample is goal


def scheduler_classes() -> Iterator[type[SchedulerMixin]]:
    """Every scheduler of diffusers that takes steps and can be imported here."""
    for name in sorted(dir(diffusers)):
        found = getattr(diffusers, name) if name.endswith("Scheduler") else None
        if isinstance(found, type) and issubclass(found, SchedulerMixin) and "step" in vars(found):
            yield found


@pytest.mark.parametrize("by_name", [False, True], ids=["by position", "by name"])
@pytest.mark.parametrize("cls", list(scheduler_classes()), ids=lambda cls: cls.__name__)
def test_a_scheduler_with_other_arguments_is_given_them_as_the_pipeline_gave_them(
    cls: type[SchedulerMixin], by_name: bool
) -> None:
    """Its step is a played one with the real one's signature: what arrives must be what was given."""
    received: list[dict[str, Any]] = []

    @functools.wraps(cls.step)
    def step(self: SchedulerMixin, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        received.append(inspect.signature(cls.step).bind(self, *args, **kwargs).arguments)
        return (arrived,)

    scheduler = object.__new__(type(cls.__name__, (cls,), {"step": step}))
    timesteps = torch.tensor([9.0, 7.0, 3.0])
    vars(scheduler)["timesteps"] = timesteps
    parameters = inspect.signature(cls.step).parameters
    names = list(parameters)[1:]
    given = {name: torch.full((2,), float(place)) for place, name in enumerate(names)} | {"timestep": timesteps[1]}
    given = {name: given[name] for name in names}
    arrived, seen = torch.ones(2), list[DenoisingStep]()
    watch_steps(scheduler, seen.append)
    named = {name for name in names if by_name or parameters[name].kind is inspect.Parameter.KEYWORD_ONLY}
    result = scheduler.step(
        *(given[name] for name in names if name not in named), **{name: given[name] for name in named}
    )
    assert result[0] is arrived
    assert all(received[0][name] is given[name] for name in names)
    if cls.__name__ in UNSEEN:
        assert not seen
        return
    (step_seen,) = seen
    assert step_seen.model_output is given["model_output"]
    assert step_seen.sample is given["sample"]
    assert step_seen.prev_sample is arrived
    assert (step_seen.number, step_seen.total, step_seen.index) == (1, 2, 1)


def test_all_schedulers_of_diffusers_are_tried() -> None:
    assert len(list(scheduler_classes())) > 40


def test_a_step_that_returns_something_else_than_the_next_sample_is_unseen() -> None:
    class Odd(SchedulerMixin):
        timesteps = torch.arange(3)

        def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor | None = None) -> str:
            return "somewhere"

    scheduler, seen = Odd(), list[DenoisingStep]()
    watch_steps(scheduler, seen.append)
    assert scheduler.step(torch.ones(1), 2) == "somewhere"
    assert not seen


def test_an_answering_scheduler_returns_the_clean_sample_to_those_that_ask_for_it() -> None:
    scheduler, goal = CogVideoXDPMScheduler(), torch.full((1, 4), 7.0)
    scheduler.set_timesteps(2)
    answer_steps(scheduler, goal)
    sample, clean = scheduler.step(goal, None, scheduler.timesteps[0], None, goal, return_dict=False)
    assert sample is goal
    assert clean is goal


def test_the_first_step_is_found_by_its_address_or_by_its_value() -> None:
    """Pipelines pass elements of the schedule, later parts of it, expanded ones, copies and numbers."""
    scheduler = flow(5)
    timesteps = scheduler.timesteps
    elements = [*timesteps]
    assert [first_index(scheduler, one) for one in elements] == [0, 1, 2, 3, 4]
    assert first_index(scheduler, next(iter(timesteps[2:]))) == 2
    assert first_index(scheduler, elements[3].expand(2)) == 3
    assert first_index(scheduler, elements[3].clone()) == 3
    assert first_index(scheduler, float(elements[4])) == 4
    assert first_index(scheduler, torch.tensor(-1.0)) == 0
    scheduler.timesteps = timesteps[1:]
    assert first_index(scheduler, elements[3]) == 2
