"""A rollout's forwards made again, from what the server told of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from .guidance import guided
from .transitions import Sampler, transition

Denoiser = Any
"""A diffusers denoiser: a module that is called as the pipeline calls it."""


class Trajectory(Protocol):
    """What is needed of a rollout's trajectory; the client's is one."""

    sigmas: torch.Tensor

    def before(self, step: int) -> torch.Tensor: ...
    def after(self, step: int) -> torch.Tensor: ...


def velocity(denoisers: Mapping[str, Denoiser], environment: Mapping[str, Any], x: torch.Tensor, step: int) -> Any:
    """The velocity [1, ...] at ``x`` [1, ...], by the denoiser of that step's component ("transformer").

    Its arguments are those of the server's call, in the denoiser's dtype as the pipeline has them; the answers are put
    together by the pipeline's own rule. Raises ``ValueError`` where the server could not tell how.
    """
    replay, guidance = environment["replay"], environment["guidance"]
    if replay is None:
        raise ValueError("the server could not tell how this pipeline makes a velocity of the denoiser's answers")
    denoiser, shared = denoisers[replay["components"][step]], environment["image_kwargs"]
    conditions = [environment["pos_cond_kwargs"]]
    if environment["neg_cond_kwargs"] is not None:
        conditions.append(environment["neg_cond_kwargs"])
    if replay["joined"] is None:
        answers = [row for one in conditions for row in _answers(denoiser, replay, shared, [one], x, step)]
    else:
        order = slice(None, None, -1 if replay["joined"] == "negative_first" else 1)
        answers = _answers(denoiser, replay, shared, conditions[order], x, step)[order]
    rest = answers[1] if len(answers) == 2 else None
    scale, widened = guidance["scale"][step], guidance["widened"]
    return guidance["sign"] * guided(guidance["rule"], answers[0], rest, scale, widened=widened)


def log_probs(
    denoisers: Mapping[str, Denoiser],
    environment: Mapping[str, Any],
    trajectory: Trajectory,
    steps: Sequence[int],
    sampler: Sampler,
    noise_level: float,
    *,
    no_const: bool = False,
) -> torch.Tensor:
    """The log-probabilities [len(steps)] of a rollout's ``steps``, all of which had noise."""
    sigmas = trajectory.sigmas.tolist()
    found = []
    for step in steps:
        x = trajectory.before(step)
        v = velocity(denoisers, environment, x, step)
        taken = transition(sampler, x, v, sigmas, step, noise_level)
        found.append(taken.log_prob(trajectory.after(step), no_const=no_const)[0])
    return torch.stack(found)


def _answers(
    denoiser: Denoiser,
    replay: Mapping[str, Any],
    shared: Mapping[str, Any],
    conditions: Sequence[Mapping[str, Any]],
    x: torch.Tensor,
    step: int,
) -> list[torch.Tensor]:
    """What the denoiser says under each of the conditions, in one call."""
    rows = len(conditions)
    latents = x.reshape(replay["shape"]).to(denoiser.dtype)
    times = {}
    if replay["timesteps"] is not None:
        times[replay["timestep"]] = replay["timesteps"][step : step + 1].expand(rows)
    given: Any = [latents] * rows if replay["listed"] else torch.stack([latents] * rows)
    own = {name: _together([one[name] for one in conditions]) for name in conditions[0]}
    output = denoiser(**{replay["latents"]: given}, **times, **shared, **own, return_dict=False)[0]
    return [row.reshape(x.shape) for row in output]


def _together(values: list[Any]) -> Any:
    """The rows of one argument, of each condition."""
    if isinstance(values[0], list):
        return [item for value in values for item in value]
    return torch.cat(values) if isinstance(values[0], torch.Tensor) and len(values) > 1 else values[0]
