"""Stochastic steps of flow matching, and the log-probabilities of the states that they reach.

A step goes from the state x at σ to x′ at σ′ < σ with the velocity v = dx/dσ. Its distribution is normal, with one
standard deviation for all elements; a step of standard deviation 0 is deterministic.

``sde``: the reverse SDE with the ODE's marginals (Flow-GRPO, https://arxiv.org/abs/2505.05470, equation 9).
``dance``: the same SDE with η itself as its diffusion coefficient at every σ (DanceGRPO,
https://arxiv.org/abs/2505.07818; ``flux_step`` of ``fastvideo/train_grpo_flux.py`` in XueZeyue/DanceGRPO).
``cps``: the step adds as much noise as its mean removes (coefficients-preserving sampling,
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
"""If a schedule begins at this σ or above, its first ``sde`` step takes its coefficient from the second σ, as in
Flow-GRPO for σ = 1, where the equation is singular."""

LEAST_NOISE = 1e-6
"""Smaller standard deviations count as 0: in fp32, such noise would vanish in the state."""


@dataclass(frozen=True, slots=True)
class Transition:
    """A normal distribution of the next state: ``mean`` [batch, ...] in fp32, and ``std`` of each element."""

    mean: torch.Tensor
    std: float

    def reach(self, noise: torch.Tensor) -> torch.Tensor:
        """The next state for standard normal ``noise`` [batch, ...]."""
        return self.mean + self.std * noise if self.std else self.mean

    def log_prob(self, reached: torch.Tensor, *, no_const: bool = False) -> torch.Tensor:
        """The log-probability density [batch] of the state ``reached`` [batch, ...], averaged over its elements.

        ``no_const`` returns only −(x′ − mean)². The result is 0 for a step without noise.
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
    """Step number ``step`` from ``x`` [batch, ...] with the velocity ``v``, in fp32.

    ``sigmas`` is the schedule [T + 1], or a mapping that has at least the σ of indices ``step`` and ``step + 1``.
    ``noise_level`` is η: 0 or more for ``sde`` and ``dance``, 0 to 1 for ``cps``.
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
