"""The forwards of rollouts made again, from what the server told of them: of one sample, or of many in one call.

A batch of one is computed as the server computed it, to the bit; a larger one is faster.
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
"""A diffusers denoiser: a module that is called as the pipeline calls it."""


class Trajectory(Protocol):
    """What is needed of a rollout's trajectory; the client's is one. ``sigmas`` are those of the places that it has."""

    @property
    def latent_indices(self) -> Sequence[int]: ...

    @property
    def sigmas(self) -> torch.Tensor: ...

    def before(self, step: int) -> torch.Tensor: ...
    def after(self, step: int) -> torch.Tensor: ...


def velocity(
    denoisers: Mapping[str, Denoiser], environments: Sequence[Mapping[str, Any]], x: torch.Tensor, step: int
) -> torch.Tensor:
    """The velocities [B, ...] at ``x`` [B, ...], by the denoiser of that step's component ("transformer").

    Its arguments are those of the server's calls for these B samples, in the denoiser's dtype as the pipeline has them;
    the answers are put together by the pipeline's own rule. Raises ``ValueError`` where the server could not tell how,
    and for samples that cannot be in one call.
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
        answers = [_answers(denoiser, replay, [own], x, step)[0] for own in conditions]
    else:
        order = slice(None, None, -1 if replay["joined"] == "negative_first" else 1)
        answers = _answers(denoiser, replay, conditions[order], x, step)[order]
    negatives = answers[1] if len(answers) == 2 else None
    scale, widened = guidance["scale"][step], guidance["widened"]
    sign: int = guidance["sign"]
    return sign * guided(guidance["rule"], answers[0], negatives, scale, widened=widened)


def log_probs(
    denoisers: Mapping[str, Denoiser],
    environments: Sequence[Mapping[str, Any] | None],
    trajectories: Sequence[Trajectory | None],
    steps: Sequence[int],
    sampler: Sampler,
    noise_level: float,
    *,
    no_const: bool = False,
    adapters: Collection[str] = (),
) -> torch.Tensor:
    """The log-probabilities [B, len(steps)] of the ``steps``, all of which had noise, of B rollouts.

    The trajectories need the latents before and after each of them. ``adapters`` are nicknames of those at the server
    that the denoisers have too; those that ``update_lora`` sent need not be named. Raises what :func:`velocity` does,
    and ``ValueError`` for rollouts that lack what is needed, differ in schedule, were drawn with other adapters, or for
    steps without noise.
    """
    check_environments(denoisers, environments)
    told = [one for one in environments if one is not None]
    check_adapters(told, adapters)
    paths = _trajectories(trajectories)
    if not paths:
        raise ValueError("there are no rollouts to replay")
    check_steps(steps, len(told[0]["replay"]["components"]), sampler, noise_level)
    _check_places(paths, steps)
    sigmas, *others = [dict(zip(one.latent_indices, one.sigmas.tolist(), strict=True)) for one in paths]
    if any(one != sigmas for one in others):
        raise ValueError("the rollouts have several schedules; replay them apart")
    found = []
    for step in steps:
        x = torch.cat([one.before(step) for one in paths])
        reached = torch.cat([one.after(step) for one in paths])
        v = velocity(denoisers, told, x, step)
        taken = transition(sampler, x.to(v.device), v, sigmas, step, noise_level)
        check_noise(step, taken)
        found.append(taken.log_prob(reached.to(v.device), no_const=no_const))
    return torch.stack(found, dim=1)


def steps_of(version: str, step_versions: Sequence[Sequence[str | None]]) -> list[int]:
    """The steps that in every one of the samples were made by weights of ``version`` alone.

    ``step_versions`` are the samples' ``step_weight_versions``. Steps of other weights have other log-probabilities
    than a denoiser of this version computes.
    """
    return [step for step, versions in enumerate(zip(*step_versions, strict=True)) if set(versions) == {version}]


def _check_places(paths: Sequence[Trajectory], steps: Sequence[int]) -> None:
    """Raises ``ValueError`` for states that were not asked for."""
    for one in paths:
        for step in steps:
            one.before(step)
            one.after(step)


def _trajectories(given: Sequence[Trajectory | None]) -> list[Trajectory]:
    missing = [sample for sample, one in enumerate(given) if one is None]
    if missing:
        raise ValueError(
            f"rollout {missing[0]} has no trajectory; ask for it with trajectory=True (rollout_return_dit_trajectory)"
        )
    return [one for one in given if one is not None]


def _answers(
    denoiser: Denoiser,
    replay: Mapping[str, Any],
    conditions: Sequence[Sequence[Mapping[str, Any]]],
    x: torch.Tensor,
    step: int,
) -> list[torch.Tensor]:
    """What the denoiser says of all samples under each of the conditions, in one call."""
    rows = len(conditions) * len(x)
    latents = [row.reshape(replay["shape"]).to(denoiser.dtype) for row in x] * len(conditions)
    times = {}
    if replay["timesteps"] is not None:
        times[replay["timestep"]] = replay["timesteps"][step : step + 1].expand(rows)
    given: Any = latents if replay["listed"] else torch.stack(latents)
    own = _together([one for condition in conditions for one in condition], replay["shared"])
    conditions_there = tree_map_only(torch.Tensor, lambda tensor: tensor.to(denoiser.device), {**times, **own})
    output = denoiser(**{replay["latents"]: given}, **conditions_there, return_dict=False)[0]
    answers = torch.stack([row.reshape(x.shape[1:]) for row in output])
    return list(answers.reshape(len(conditions), *x.shape))


def _together(rows: Sequence[Mapping[str, Any]], shared: Sequence[str]) -> dict[str, Any]:
    """The arguments of several rows as those of one call, in which all rows have ``shared`` in common."""
    first, *others = rows
    if any(one.keys() != first.keys() for one in others):
        raise ValueError("the samples' calls have different arguments; replay them apart")
    return {name: (_common if name in shared else _joined)(name, [one[name] for one in rows]) for name in first}


def _joined(name: str, values: list[Any]) -> Any:
    """One argument: tensors and lists of one row are put together, others are what all rows have in common."""
    first, *others = values
    if not others:
        return first
    if isinstance(first, list) and len(first) == 1:
        return [item for value in values for item in value]
    if isinstance(first, torch.Tensor) and first.ndim > 0 and len(first) == 1:
        if any(value.shape != first.shape for value in others):
            raise ValueError(f"{name} is of different lengths; replay the samples apart")
        return torch.cat(values)
    return _common(name, values)


def _common(name: str, values: list[Any]) -> Any:
    first, *others = values
    if not all(equal(value, first) for value in others):
        raise ValueError(f"{name} differs between samples; replay them apart")
    return first
