"""Steps are seen where they are taken, and only there."""

from __future__ import annotations

import copy
import inspect

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from safelight.worker.steps import Step, answer_steps, watch_steps


def flow(steps: int = 4) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    return scheduler


def test_a_deep_copy_of_a_watched_scheduler_takes_its_own_steps_unseen() -> None:
    seen: list[Step] = []
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
    seen: list[Step] = []
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
    seen: list[Step] = []
    scheduler = flow()
    watch_steps(scheduler, seen.append)
    clean, noise = torch.full((1, 4), 0.3), torch.randn(1, 4)
    sigma = scheduler.sigmas[0]
    scheduler.step(noise - clean, scheduler.timesteps[0], sigma * noise + (1 - sigma) * clean)
    assert torch.allclose(seen[0].clean_estimate(), clean, atol=1e-6)


def test_an_answering_scheduler_arrives_where_it_was_told_in_both_return_forms() -> None:
    scheduler, goal = flow(), torch.full((1, 4), 7.0)
    answer_steps(scheduler, goal)
    sample = torch.zeros(1, 4)
    assert scheduler.step(sample, scheduler.timesteps[0], sample, return_dict=False)[0] is goal
    assert scheduler.step(sample, scheduler.timesteps[0], sample).prev_sample is goal
