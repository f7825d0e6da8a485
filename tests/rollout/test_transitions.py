"""The formulas of stochastic steps, against an implementation of their own in fp64, and against what they are for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from safelight.rollout.transitions import Sampler, Transition, transition

SIGMAS = [1.0, 0.9375, 0.75, 0.4, 0.11, 0.0]
SAMPLERS: list[tuple[Sampler, float]] = [
    ("sde", 0.7),
    ("sde", 1.3),
    ("dance", 0.3),
    ("dance", 1.2),
    ("cps", 0.3),
    ("cps", 1.0),
    ("ode", 0.7),
]

Floats = np.ndarray[Any, np.dtype[np.float64]]


def in_fp64(sampler: Sampler, x: Floats, v: Floats, step: int, eta: float) -> tuple[Floats, float]:
    """Mean and standard deviation, written down from the definitions and not from the code."""
    s0, s1 = SIGMAS[step], SIGMAS[step + 1]
    if sampler == "sde":
        g = eta * math.sqrt(s0 / (1.0 - (SIGMAS[1] if s0 == 1.0 else s0)))
        drift = v + g * g / (2.0 * s0) * (x + (1.0 - s0) * v)
        return x + drift * (s1 - s0), g * math.sqrt(s0 - s1)
    if sampler == "dance":
        clean = x - s0 * v
        score = -(x - clean * (1.0 - s0)) / s0**2
        return x + (s1 - s0) * v - 0.5 * eta**2 * score * (s1 - s0), eta * math.sqrt(s0 - s1)
    if sampler == "cps":
        std = s1 * math.sin(eta * math.pi / 2)
        return (1.0 - s1) * (x - s0 * v) + math.sqrt(max(0.0, s1 * s1 - std * std)) * (x + (1.0 - s0) * v), std
    return x + (s1 - s0) * v, 0.0


@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
@pytest.mark.parametrize("step", range(len(SIGMAS) - 1))
def test_each_step_is_what_fp64_says(sampler: Sampler, eta: float, step: int) -> None:
    numbers = np.random.default_rng(step)
    x, v, noise = (numbers.normal(size=(3, 4, 5)) for _ in range(3))
    mean, std = in_fp64(sampler, x, v, step, eta)
    taken = transition(sampler, torch.tensor(x).float(), torch.tensor(v).float(), SIGMAS, step, eta)
    assert taken.mean.dtype == torch.float32
    assert np.abs(taken.mean.double().numpy() - mean).max() < 3e-6
    assert taken.std == pytest.approx(std, rel=1e-12, abs=1e-15)
    reached = taken.reach(torch.tensor(noise).float())
    assert np.abs(reached.double().numpy() - (mean + std * noise)).max() < 5e-6
    for no_const in (False, True):
        got = taken.log_prob(reached, no_const=no_const)
        assert got.shape == (3,)
        squares = ((std * noise) ** 2).mean((1, 2))
        wanted = -squares
        if std and not no_const:
            wanted = -squares / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
        assert np.abs(got.double().numpy() - wanted).max() < 1e-5


@pytest.mark.parametrize(("sampler", "eta"), [("sde", 0.0), ("cps", 0.0), ("cps", 1.0), ("ode", 0.7)])
def test_a_step_without_noise_has_log_probability_zero(sampler: Sampler, eta: float) -> None:
    x, v = torch.randn(2, 2, 3, 3)
    step = len(SIGMAS) - 2 if sampler == "cps" and eta == 1.0 else 1  # to sigma 0
    taken = transition(sampler, x, v, SIGMAS, step, eta)
    assert taken.std == 0
    for no_const in (False, True):
        assert torch.equal(taken.log_prob(taken.reach(torch.randn(2, 3, 3)), no_const=no_const), torch.zeros(2))


def test_low_precision_is_computed_with_in_fp32() -> None:
    x, v = torch.randn(2, 1, 64).bfloat16()
    taken = transition("sde", x, v, SIGMAS, 2, 0.7)
    exact = transition("sde", x.float(), v.float(), SIGMAS, 2, 0.7)
    assert torch.equal(taken.mean, exact.mean)


def test_a_schedule_that_begins_just_below_one_is_stepped_like_one_that_begins_at_one() -> None:
    x, v = torch.randn(2, 1, 64)
    below, at = (transition("sde", x, v, [first, *SIGMAS[1:]], 0, 0.7) for first in (0.99999, 1.0))
    assert below.std == pytest.approx(at.std, rel=1e-3)
    assert torch.allclose(below.mean, at.mean, atol=1e-3)


def test_a_schedule_that_begins_further_below_one_takes_its_own_sigma_as_other_trainers_do() -> None:
    x, v = torch.randn(2, 1, 64)
    for first in (0.99, 0.995, 0.9999, 0.99998):
        taken = transition("sde", x, v, [first, *SIGMAS[1:]], 0, 0.7)
        wanted = 0.7 * math.sqrt(first / (1 - first)) * math.sqrt(first - SIGMAS[1])
        assert taken.std == pytest.approx(wanted, rel=1e-9)


def test_only_the_first_step_takes_its_noise_from_the_next_sigma() -> None:
    """A schedule that is shifted far has several steps above 0.99, and its equation a value at all but the first."""
    sigmas = [12 * s / (1 + 11 * s) for s in (1 - i / 40 for i in range(41))]
    assert sigmas[3] > 0.99
    x, v = torch.randn(2, 1, 64)
    for step in (1, 2, 3):
        taken, s0, s1 = transition("sde", x, v, sigmas, step, 0.7), sigmas[step], sigmas[step + 1]
        assert taken.std == pytest.approx(0.7 * math.sqrt(s0 / (1 - s0)) * math.sqrt(s0 - s1), rel=1e-9)


def test_what_is_more_probable_is_nearer_to_the_mean() -> None:
    taken = Transition(torch.zeros(3, 8), 0.5)
    near, middle, far = taken.log_prob(torch.tensor([0.0, 0.4, 2.0])[:, None].expand(3, 8)).tolist()
    assert near > middle > far
    assert near == pytest.approx(float(torch.distributions.Normal(0.0, 0.5).log_prob(torch.zeros(()))))


# --- marginals

PEOPLE = 200_000
MEAN, SPREAD = 0.8, 0.35


def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """E[noise − data | x] where x = (1 − σ) data + σ noise, for data of N(MEAN, SPREAD²)."""
    variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
    off = x - (1 - sigma) * MEAN
    noise = sigma / variance * off
    data = MEAN + (1 - sigma) * SPREAD**2 / variance * off
    return noise - data


def moments(sampler: Sampler, eta: float, steps: int) -> torch.Tensor:
    """Mean and variance of many samples at σ of 0.6, 0.3 and 0: [3, 2].

    They begin at 0.9, as data with that much noise: next to 1 the SDE's noise has no bound, and steps no order.
    """
    generator = torch.Generator().manual_seed(steps)
    sigmas = torch.linspace(0.9, 0, steps + 1).tolist()
    data, noise = torch.randn(2, PEOPLE, 1, generator=generator)
    x, found = 0.1 * (MEAN + SPREAD * data) + 0.9 * noise, []
    for step in range(steps):
        taken = transition(sampler, x, velocity(x, sigmas[step]), sigmas, step, eta)
        x = taken.reach(torch.randn(PEOPLE, 1, generator=generator)) if taken.std else taken.mean
        if 3 * (step + 1) % steps == 0:
            found.append(torch.stack([x.mean(), x.var()]))
    return torch.stack(found)


@pytest.mark.parametrize(("sampler", "eta"), [("sde", 0.4), ("sde", 0.7), ("sde", 1.0), ("dance", 0.7), ("ode", 0.0)])
def test_the_sde_has_the_marginals_of_the_ode(sampler: Sampler, eta: float) -> None:
    """The error of Euler's steps is of first order, so that twice the finer less the coarser is without it."""
    got = 2 * moments(sampler, eta, 300) - moments(sampler, eta, 150)
    for (mean, variance), sigma in zip(got.tolist(), (0.6, 0.3, 0.0), strict=True):
        exact = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
        errors = math.sqrt(5)  # of that combination, in those of one
        assert abs(mean - (1 - sigma) * MEAN) < 4 * errors * math.sqrt(exact / PEOPLE) + 1e-3
        assert abs(variance - exact) < 4 * errors * exact * math.sqrt(2 / PEOPLE) + 1e-3


@pytest.mark.parametrize("eta", [0.3, 0.8, 1.0])
def test_cps_adds_as_much_noise_as_it_takes_away(eta: float) -> None:
    """Where data and noise are known, what is reached is the data with noise of the schedule's σ."""
    data, noise, fresh = torch.randn(3, PEOPLE, 1, generator=torch.Generator().manual_seed(0))
    for step in range(len(SIGMAS) - 1):
        x = (1 - SIGMAS[step]) * data + SIGMAS[step] * noise
        reached = transition("cps", x, noise - data, SIGMAS, step, eta).reach(fresh)
        left = reached - (1 - SIGMAS[step + 1]) * data
        assert abs(float(left.std()) - SIGMAS[step + 1]) < 5 * SIGMAS[step + 1] / math.sqrt(2 * PEOPLE) + 1e-6
        assert abs(float((left * data).mean())) < 5 * SIGMAS[step + 1] / math.sqrt(PEOPLE) + 1e-6
