"""Replay the denoiser's forwards of rollouts from the server's records, for one sample or many in one call.

A batch of one is bitwise what the server computed; a larger batch is faster.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only

from .equality import equal
from .guidance import guided
from .replayable import check_adapters, check_dtype, check_environments, check_noise, check_steps
from .transitions import Sampler, transition

Denoiser = Any
"""A diffusers denoiser module, called with the pipeline's arguments."""


class ReplayedTrajectory(Protocol):
    """The interface of a rollout's trajectory, such as the client's. ``sigmas`` belong to ``latent_indices``."""

    @property
    def latent_indices(self) -> Sequence[int]: ...

    @property
    def sigmas(self) -> torch.Tensor: ...

    def before(self, step: int) -> torch.Tensor: ...
    def after(self, step: int) -> torch.Tensor: ...


def velocity(
    denoisers: Mapping[str, Denoiser], environments: Sequence[Mapping[str, Any]], x: torch.Tensor, step: int
) -> torch.Tensor:
    """The velocities [B, ...] at ``x`` [B, ...], computed by the denoiser of the step's component ("transformer").

    The denoiser gets the arguments of the server's calls for these B samples, cast to its dtype as the pipeline does;
    the pipeline's guidance rule combines the predictions. Raises ``ValueError`` if the server could not record how to
    call it, and for samples that cannot share a call.
    """
    if len(environments) != len(x):
        raise ValueError(f"{len(x)} states have {len(environments)} environments")
    check_environments(denoisers, environments)
    replay, guidance = environments[0]["replay"], environments[0]["guidance"]
    if not all(equal((one["replay"], one["guidance"]), (replay, guidance)) for one in environments):
        raise ValueError("the samples' calls differ in schedule, shape or guidance; replay them apart")
    component = replay["components"][step]
    denoiser = denoisers[component]
    check_dtype(component, denoiser, replay)
    x = x.to(denoiser.device)
    kinds = ["pos_cond_kwargs"] + (["neg_cond_kwargs"] if environments[0]["neg_cond_kwargs"] is not None else [])
    conditions = [[{**one["image_kwargs"], **one[kind]} for one in environments] for kind in kinds]
    if replay["joined"] is None:
        predictions = [_predictions(denoiser, replay, [own], x, step)[0] for own in conditions]
    else:
        order = slice(None, None, -1 if replay["joined"] == "negative_first" else 1)
        predictions = _predictions(denoiser, replay, conditions[order], x, step)[order]
    negatives = predictions[1] if len(predictions) == 2 else None
    scale, widened = guidance["scale"][step], guidance["widened"]
    sign: int = guidance["sign"]
    return sign * guided(guidance["rule"], predictions[0], negatives, scale, widened=widened)


def log_probs(
    denoisers: Mapping[str, Denoiser],
    environments: Sequence[Mapping[str, Any] | None],
    trajectories: Sequence[ReplayedTrajectory | None],
    steps: Sequence[int],
    sampler: Sampler,
    noise_level: float,
    *,
    no_const: bool = False,
    adapters: Collection[str] = (),
) -> torch.Tensor:
    """The log-probabilities [B, len(steps)] of the given ``steps`` of B rollouts; each step must have noise.

    The trajectories need the latents before and after each step. ``adapters`` names the server's adapters that the
    denoisers have too, except those sent by ``update_lora``. Raises the errors of :func:`velocity`, and ``ValueError``
    for rollouts without the needed records, with different schedules or with other adapters, and for steps without
    noise.
    """
    check_environments(denoisers, environments)
    recorded = [one for one in environments if one is not None]
    check_adapters(recorded, adapters)
    paths = _trajectories(trajectories)
    if not paths:
        raise ValueError("there are no rollouts to replay")
    check_steps(steps, len(recorded[0]["replay"]["components"]), sampler, noise_level)
    _check_states(paths, steps)
    sigmas, *others = [dict(zip(one.latent_indices, one.sigmas.tolist(), strict=True)) for one in paths]
    if any(one != sigmas for one in others):
        raise ValueError("the rollouts have several schedules; replay them apart")
    found = []
    for step in steps:
        x = torch.cat([one.before(step) for one in paths])
        reached = torch.cat([one.after(step) for one in paths])
        v = velocity(denoisers, recorded, x, step)
        taken = transition(sampler, x.to(v.device), v, sigmas, step, noise_level)
        check_noise(step, taken)
        found.append(taken.log_prob(reached.to(v.device), no_const=no_const))
    return torch.stack(found, dim=1)


def steps_of(version: str, step_versions: Sequence[Sequence[str | None]]) -> list[int]:
    """The steps that weights of ``version`` alone computed in every sample.

    ``step_versions`` are the samples' ``step_weight_versions``. A denoiser of this version computes different
    log-probabilities for the other steps.
    """
    return [step for step, versions in enumerate(zip(*step_versions, strict=True)) if set(versions) == {version}]


def _check_states(paths: Sequence[ReplayedTrajectory], steps: Sequence[int]) -> None:
    """Raises ``ValueError`` for states that were not requested."""
    for one in paths:
        for step in steps:
            one.before(step)
            one.after(step)


def _trajectories(trajectories: Sequence[ReplayedTrajectory | None]) -> list[ReplayedTrajectory]:
    missing = [sample for sample, one in enumerate(trajectories) if one is None]
    if missing:
        raise ValueError(
            f"rollout {missing[0]} has no trajectory; ask for it with trajectory=True (rollout_return_dit_trajectory)"
        )
    return [one for one in trajectories if one is not None]


def _predictions(
    denoiser: Denoiser,
    replay: Mapping[str, Any],
    conditions: Sequence[Sequence[Mapping[str, Any]]],
    x: torch.Tensor,
    step: int,
) -> list[torch.Tensor]:
    """The denoiser's predictions [B, ...] under each of the conditions, from one call."""
    rows = len(conditions) * len(x)
    latents = [row.reshape(replay["shape"]).to(denoiser.dtype) for row in x] * len(conditions)
    times = {}
    if replay["timesteps"] is not None:
        times[replay["timestep"]] = replay["timesteps"][step : step + 1].expand(rows)
    states: Any = latents if replay["listed"] else torch.stack(latents)
    own = _collated([one for condition in conditions for one in condition], replay["shared"])
    conditions_there = tree_map_only(torch.Tensor, lambda tensor: tensor.to(denoiser.device), {**times, **own})
    output = denoiser(**{replay["latents"]: states}, **conditions_there, return_dict=False)[0]
    predictions = torch.stack([row.reshape(x.shape[1:]) for row in output])
    return list(predictions.reshape(len(conditions), *x.shape))


def _collated(rows: Sequence[Mapping[str, Any]], shared: Sequence[str]) -> dict[str, Any]:
    """Collate the arguments of several rows into those of one call; ``shared`` arguments must be equal in all rows."""
    first, *others = rows
    if any(one.keys() != first.keys() for one in others):
        raise ValueError("the samples' calls have different arguments; replay them apart")
    return {name: (_common if name in shared else _joined)(name, [one[name] for one in rows]) for name in first}


def _joined(name: str, values: list[Any]) -> Any:
    """Collate one argument: concatenate tensors and lists of one row each; other values must be equal."""
    first, *others = values
    if not others:
        return first
    if isinstance(first, list) and len(first) == 1:
        return [item for value in values for item in value]
    if isinstance(first, torch.Tensor) and first.ndim > 0 and len(first) == 1:
        if any(value.shape != first.shape for value in others):
            raise ValueError(f"{name} has different lengths; replay the samples apart")
        return torch.cat(values)
    return _common(name, values)


def _common(name: str, values: list[Any]) -> Any:
    first, *others = values
    if not all(equal(value, first) for value in others):
        raise ValueError(f"{name} differs between samples; replay them apart")
    return first
