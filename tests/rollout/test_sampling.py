"""A rollout's steps, on a scheduler of diffusers' own and without a pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from safelight.protocol.errors import InvalidRequest
from safelight.protocol.rollouts import Rollout, StepNoise
from safelight.worker.rollout.sampling import RolloutSampler
from safelight.worker.rollout.schedule import follow, shift

SEEDS = [7660698733667254724, 1081622509871787517, 6008251927247404766]


def first_step(sigmas: list[float], dtype: torch.dtype, **asked: Any) -> RolloutSampler:
    """One step is taken, from noise along a velocity of noise."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    follow(scheduler, sigmas)
    scheduler.set_timesteps(3)
    generator = torch.Generator().manual_seed(0)
    sampler = RolloutSampler(scheduler, Rollout(**asked), lambda _: generator, lambda *_: None)
    x, v = torch.randn(2, 1, 4, 8, generator=generator).to(dtype)
    sampler.step(v, scheduler.timesteps[0], x)
    return sampler


def test_a_first_step_beyond_the_numbers_of_the_model_s_dtype_is_refused_with_its_sigma() -> None:
    named = r"Step 0, from sigma 0\.99997\d* to 0\.5,"
    with pytest.raises(InvalidRequest, match=named) as refused:
        first_step([0.99998, 0.5, 0.2], torch.float16, noise_level=7.0)
    assert refused.value.field == "rollout_sde_step_indices"
    first_step([0.99998, 0.5, 0.2], torch.float16, noise_level=7.0, sde_steps=[1])
    first_step([1.0, 0.5, 0.2], torch.float16, noise_level=7.0)


def test_a_step_that_does_not_fall_is_refused_with_its_sigma() -> None:
    """A shift may be so large that two sigmas are 1 in fp32: at the second, no noise is finite."""
    with pytest.raises(InvalidRequest, match="Step 0 goes from sigma 1 to 1;"):
        first_step([1.0, 1.0, 0.2], torch.float32)


def test_seeds_of_steps_are_those_that_trainers_derive() -> None:
    """blake2b of seed, step and the sample's own key, as big-endian, below 2^63 - 1."""
    noise = StepNoise(["a", "b"], 7)
    assert [noise.seed_of(0, 5, 0), noise.seed_of(1, 5, 0), noise.seed_of(0, 5, 1)] == SEEDS
    assert StepNoise(["a"], None).seed_of(0, 7, 0) == SEEDS[0]


def test_a_flow_shift_is_that_of_one_request_and_gives_the_schedule_that_diffusers_gives(
    checkpoint: Callable[[str], Path],
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(checkpoint("sd3"))
    asked, shifted = copy.copy(pipeline), copy.deepcopy(dict(pipeline.scheduler.config)) | {"shift": 6.0}
    shift(asked, 6.0)
    plain = FlowMatchEulerDiscreteScheduler.from_config(shifted)
    for scheduler in (asked.scheduler, plain, pipeline.scheduler):
        scheduler.set_timesteps(5)
    assert torch.equal(asked.scheduler.sigmas, plain.sigmas)
    assert not torch.equal(pipeline.scheduler.sigmas, plain.sigmas)
    assert pipeline.scheduler.config.shift != 6.0
    with pytest.raises(InvalidRequest, match="not shifted by a number"):
        shift(DiffusionPipeline.from_pretrained(checkpoint("sd15")), 6.0)
