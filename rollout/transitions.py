"""Stochastic steps of flow matching, and how probable what they arrived at was.

A step goes from the state x at σ to x′ at σ′ < σ, by the velocity v = dx/dσ. Its distribution is normal, with a
standard deviation that all elements have in common; where that is 0 the step is deterministic.

``sde``: the reverse SDE with the ODE's marginals (Flow-GRPO, https://arxiv.org/abs/2505.05470, equation 9).
``dance``: the same SDE with η itself as its diffusion coefficient at every σ (DanceGRPO,
https://arxiv.org/abs/2505.07818; ``flux_step`` of ``fastvideo/train_grpo_flux.py`` in XueZeyue/DanceGRPO).
``cps``: as much noise is added as the mean takes away (coefficients-preserving sampling,
https://arxiv.org/abs/2509.05952). ``ode``: the step without noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Sampler = Literal["sde", "dance", "cps", "ode"]

ALL_NOISE = 1 - 1e-5
"""A schedule that begins here or above takes the coefficient of its first ``sde`` step from its second σ, as Flow-GRPO
does at 1, where the equation has no value."""

LEAST_NOISE = 1e-6
"""Of a standard deviation. Less is none: in fp32 it would be lost in the state."""


@dataclass(frozen=True, slots=True)
class Transition:
    """A normal distribution over the next state: ``mean`` [batch, ...] in fp32, and ``std`` of every element."""

    mean: torch.Tensor
    std: float

    def reach(self, noise: torch.Tensor) -> torch.Tensor:
        """The next state that standard normal ``noise`` [batch, ...] leads to."""
        return self.mean + self.std * noise if self.std else self.mean

    def log_prob(self, reached: torch.Tensor, *, no_const: bool = False) -> torch.Tensor:
        """The log-probability density [batch] of the state ``reached`` [batch, ...], averaged over its elements.

        ``no_const`` gives −(x′ − mean)² alone. Of a step without noise it is 0.
        """
        if not self.std:
            return self.mean.new_zeros(len(self.mean))
        off = reached.float() - self.mean
        if no_const:
            return -off.square().flatten(1).mean(1)
        constant = math.log(self.std) + 0.5 * math.log(2 * math.pi)
        return (-(off / self.std).square() / 2 - constant).flatten(1).mean(1)


def transition(
    sampler: Sampler,
    x: torch.Tensor,
    v: torch.Tensor,
    sigmas: Sequence[float] | Mapping[int, float],
    step: int,
    noise_level: float,
) -> Transition:
    """Step number ``step`` from ``x`` [batch, ...] by the velocity ``v``, in fp32.

    ``sigmas`` are the schedule's [T + 1], or those before and after this step by their places in it. ``noise_level`` is
    η: of ``sde`` and ``dance`` any number from 0, of ``cps`` from 0 to 1.
    """
    x, v = x.float(), v.float()
    sigma, after = float(sigmas[step]), float(sigmas[step + 1])
    dt = after - sigma
    if sampler == "ode" or not noise_level:
        return Transition(x + dt * v, 0.0)
    if sampler == "cps":
        std = _noise(after * math.sin(noise_level * math.pi / 2))
        clean, noise = x - sigma * v, x + (1 - sigma) * v
        return Transition(clean * (1 - after) + noise * math.sqrt(max(0.0, after**2 - std**2)), std)
    spread = noise_level
    if sampler == "sde":
        below_one = after if step == 0 and sigma >= ALL_NOISE else sigma
        spread *= math.sqrt(sigma / (1 - below_one))
    return Transition(
        x * (1 + spread**2 / (2 * sigma) * dt) + v * ((1 + spread**2 * (1 - sigma) / (2 * sigma)) * dt),
        _noise(spread * math.sqrt(-dt)),
    )


def _noise(std: float) -> float:
    return std if std > LEAST_NOISE else 0.0
