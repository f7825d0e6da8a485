"""Why the forwards or the log-probabilities of rollouts cannot be computed again, in words for the trainer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from .transitions import Sampler, Transition

SENT = "lora_merge:"
"""Adapters called so were sent by the trainer itself (``client.weights.update_lora``)."""


def check_environments(denoisers: Mapping[str, Any], environments: Sequence[Mapping[str, Any] | None]) -> None:
    """Raises ``ValueError`` where the denoiser's calls cannot be made again."""
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
            raise ValueError(f"the server drew with {component}; the denoisers given are {given}")


def check_dtype(component: str, denoiser: Any, replay: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for a denoiser that cannot read what the server's was given. Autocast casts by itself."""
    served = replay.get("dtype")  # older servers do not say
    own = str(denoiser.dtype).removeprefix("torch.")
    if served not in (None, own) and not torch.is_autocast_enabled(torch.device(denoiser.device).type):
        raise ValueError(
            f"the server's {component} computes in {served}, and the one given is in {own}; load it in {served}, "
            f"serve with --dtype {own}, or call it under torch.autocast"
        )


def check_adapters(environments: Sequence[Mapping[str, Any]], own: Collection[str]) -> None:
    """Raises ``ValueError`` where an adapter changed the denoiser that is not the trainer's ``own``."""
    for sample, environment in enumerate(environments):
        components = set(environment["replay"]["components"])
        for one in environment.get("adapters", ()):
            name, mode = one["nickname"], one["mode"]
            if one["component"] in components and one["strength"] and not name.startswith(SENT) and name not in own:
                raise ValueError(
                    f"rollout {sample} was drawn with the adapter {name!r} ({mode}, strength {one['strength']:g}) in "
                    f"{one['component']}, so that its log-probabilities are not those of the weights alone; unload "
                    f"it from the server, or load it into the denoiser and say adapters=[{name!r}]"
                )


def check_steps(steps: Sequence[int], total: int, sampler: Sampler, noise_level: float) -> None:
    """Raises ``ValueError`` for steps that a schedule does not have, and where no step has noise."""
    if sampler == "ode" or not noise_level:
        how = "sampler is 'ode'" if sampler == "ode" else "noise_level is 0"
        raise ValueError(
            f"{how}: steps without noise have no log-probability to learn from; use 'sde', 'dance' or 'cps'"
        )
    for step in steps:
        if not 0 <= step < total:
            raise ValueError(f"there is no step {step}; the rollouts have steps 0 to {total - 1}")


def check_noise(step: int, taken: Transition) -> None:
    """Raises ``ValueError`` for a step without noise."""
    if not taken.std:
        raise ValueError(f"step {step} has no noise, and so no log-probability; leave it out of steps")


def _why_no_replay(environment: Mapping[str, Any]) -> str:
    if environment["guidance"]["rule"] is None:
        return "the server could not tell how this pipeline makes a velocity of the denoiser's answers"
    return (
        "the server could not tell how to make its calls again, as the denoiser's arguments change between steps or it "
        "is given more than the state; rollout_model_outputs (debug=True) has the velocities"
    )
