"""Checks before a replay; each error tells the trainer why a rollout cannot be replayed, and the remedy."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args

import torch

from .transitions import Sampler, Transition

SENT = "lora_merge:"
"""The prefix of adapters that the trainer itself sent (``client.weights.update_lora``)."""


def check_environments(denoisers: Mapping[str, Any], environments: Sequence[Mapping[str, Any] | None]) -> None:
    """Raises ``ValueError`` if the denoiser's calls cannot be replayed."""
    for sample, environment in enumerate(environments):
        if environment is None:
            raise ValueError(
                f"rollout {sample} has no environment; ask for it with environment=True (rollout_return_denoising_env)"
            )
        if environment["replay"] is None:
            raise ValueError(f"rollout {sample} cannot be replayed: {_why_no_replay(environment)}")
    for component in sorted({name for one in environments if one is not None for name in one["replay"]["components"]}):
        if component not in denoisers:
            given = ", ".join(denoisers) or "nothing"
            raise ValueError(f"the server used the denoiser {component}; the denoisers given are {given}")


def check_dtype(component: str, denoiser: Any, replay: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for a denoiser of another dtype than the server's, except under autocast, which casts."""
    served = replay.get("dtype")  # absent in replies of older servers
    own = str(denoiser.dtype).removeprefix("torch.")
    if served not in (None, own) and not torch.is_autocast_enabled(torch.device(denoiser.device).type):
        raise ValueError(
            f"the server's {component} computes in {served}, and the one given is in {own}; load it in {served}, "
            f"serve with --dtype {own}, or call it under torch.autocast"
        )


def check_adapters(environments: Sequence[Mapping[str, Any]], own: Collection[str]) -> None:
    """Raises ``ValueError`` if an adapter outside the trainer's ``own`` changed the denoiser."""
    for sample, environment in enumerate(environments):
        components = set(environment["replay"]["components"])
        for one in environment.get("adapters", ()):
            name, mode = one["nickname"], one["mode"]
            if one["component"] in components and one["strength"] and not name.startswith(SENT) and name not in own:
                raise ValueError(
                    f"rollout {sample} was drawn with the adapter {name!r} ({mode}, strength {one['strength']:g}) in "
                    f"{one['component']}, so its log-probabilities are not those of the weights alone; unload the "
                    f"adapter from the server, or load it into the denoiser and pass adapters=[{name!r}]"
                )


def check_steps(steps: Sequence[int], total: int, sampler: Sampler, noise_level: float) -> None:
    """Raises ``ValueError`` for steps outside the schedule, and for samplers without noise."""
    if sampler == "ode" or not noise_level:
        how = "sampler is 'ode'" if sampler == "ode" else "noise_level is 0"
        noisy = ", ".join(repr(name) for name in get_args(Sampler) if name != "ode")
        raise ValueError(f"{how}: steps without noise have no log-probability to learn from; use one of {noisy}")
    for step in steps:
        if not 0 <= step < total:
            raise ValueError(f"there is no step {step}; the rollouts have steps 0 to {total - 1}")


def check_noise(step: int, taken: Transition) -> None:
    """Raises ``ValueError`` for a step without noise."""
    if not taken.std:
        raise ValueError(f"step {step} has no noise, so no log-probability; remove it from steps")


def _why_no_replay(environment: Mapping[str, Any]) -> str:
    if environment["guidance"]["rule"] is None:
        return "the server could not determine how this pipeline combines the denoiser's predictions into a velocity"
    return (
        "the denoiser's arguments change between steps, or contain more than the state, so its calls cannot be made "
        "again; rollout_model_outputs (debug=True) has the velocities"
    )
