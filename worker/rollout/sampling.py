"""The rollout sampler: takes a fork's denoising steps in the scheduler's place, adds noise, and records them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ...protocol.errors import InvalidRequest
from ...protocol.rollouts import Rollout
from ...rollout.transitions import Transition, transition
from ..crossing.fork import schedulers
from ..crossing.steps import first_index
from ..parallel.device import pinned
from .late_values import LateEqualities

_EULER = "FlowMatchEulerDiscreteScheduler"

MAX_BYTES = 2 << 30
"""The limit on one sample's latents and debug tensors, which stay in memory until it ends."""


def why_no_rollouts(pipeline: DiffusionPipeline) -> str | None:
    """The reason why the pipeline cannot be rolled out; ``None`` if it can."""
    found = schedulers(pipeline)
    if len(found) != 1:
        return f"it has {len(found)} schedulers that take steps, and one is needed"
    (scheduler,) = found
    name, config = type(scheduler).__name__, scheduler.config
    flows = name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"
    if not flows or not hasattr(scheduler, "sigmas"):
        return f"its {name} does not follow a flow from noise to pictures"
    if config.get("invert_sigmas") or config.get("stochastic_sampling"):
        return f"its {name} does not go from noise at sigma 1 to pictures at sigma 0"
    if getattr(scheduler, "order", 1) != 1:
        return f"its {name} calls the denoiser several times for one step"
    return None


@dataclass(slots=True)
class RecordedSteps:
    """The record of each step, and the requested latents. Tensors have no batch dimension.

    ``latents`` maps i to x before step i; the index after the last step is the final x.
    """

    sigmas: list[float] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    latents: dict[int, torch.Tensor] = field(default_factory=dict)
    log_probs: list[torch.Tensor] = field(default_factory=list)
    noises: list[torch.Tensor] = field(default_factory=list)
    means: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    stds: list[float] = field(default_factory=list)

    @property
    def is_finite(self) -> bool:
        """True if no log-probability is NaN or infinite."""
        return bool(torch.stack(self.log_probs).isfinite().all())


class RolloutSampler:
    """Takes the steps of ``scheduler``, a fork's own; the state is fp32 for every dtype of the model.

    ``on_step`` receives each velocity and the state for which it was computed. ``generators`` maps a step's number to
    the generator of its noise.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        rollout: Rollout,
        generators: Callable[[int], torch.Generator],
        on_step: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> None:
        self.recorded = RecordedSteps()
        self.name = _name(scheduler, rollout)
        self._scheduler = scheduler
        self._rollout = rollout
        self._generators = generators
        self._on_step = on_step
        self._unchanged = LateEqualities()
        self._first: int | None = None
        self._state: torch.Tensor | None = None
        self._given: tuple[torch.Tensor, int] | None = None  # the state that the pipeline received, and its version

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Replaces the scheduler's ``step``."""
        if kwargs.get("per_token_timesteps") is not None:
            raise InvalidRequest("This pipeline steps each token separately; rollouts cannot.", field="rollout")
        if self._first is None:
            self._begin(timestep, sample)
        number = len(self.recorded.log_probs)
        x = self._state_of(sample)
        self._on_step(model_output, sample)
        if self._rollout.sampler == "ode" and type(self._scheduler).__name__ == _EULER:
            own = type(self._scheduler).step(self._scheduler, model_output, timestep, sample, *args, **kwargs)
            reached = own[0] if isinstance(own, tuple) else own.prev_sample
            self._record(number, x, model_output, Transition(reached.float(), 0.0), None, reached.float())
            self._state = self._given = None
            return own
        sampler = self._rollout.sampler if self._is_noisy(number) else "ode"
        taken = transition(sampler, x, model_output, self.recorded.sigmas, number, self._rollout.noise_level)
        noise = self._noise(x, number) if taken.std else None
        reached = taken.mean if noise is None else taken.reach(noise)
        self._record(number, x, model_output, taken, noise, reached)
        given = reached.to(sample.dtype, copy=True)  # a copy, because the pipeline may write to it
        if number == 0 and noise is not None and not given.isfinite().all() and model_output.isfinite().all():
            raise self._first_step_refused()
        self._state, self._given = reached, (given, given._version)
        return _Stepped(given) if kwargs.get("return_dict", True) else (given,)

    def end(self) -> RecordedSteps:
        """The record of all steps. Raises ``InvalidRequest`` if the pipeline took some with another scheduler."""
        if len(self.recorded.log_probs) != len(self.recorded.timesteps) or not self.recorded.log_probs:
            taken, steps = len(self.recorded.log_probs), len(self.recorded.timesteps)
            raise InvalidRequest(f"This pipeline took {taken} of {steps} steps by its own scheduler.", field="rollout")
        if not self._unchanged.hold():
            raise InvalidRequest(
                "This pipeline changes the latents between steps, so log-probabilities would not match the output.",
                field="rollout",
            )
        return self.recorded

    def _begin(self, timestep: Any, sample: torch.Tensor) -> None:
        if len(sample) != 1:
            raise InvalidRequest("This pipeline draws several samples at once; rollouts cannot.", field="rollout")
        self._first = first_index(self._scheduler, timestep)
        self.recorded.sigmas = self._scheduler.sigmas[self._first :].double().tolist()
        self.recorded.timesteps = self._scheduler.timesteps[self._first :].double().tolist()
        for step, (sigma, after) in enumerate(itertools.pairwise(self.recorded.sigmas)):
            if not 1 >= sigma > after >= 0:
                raise InvalidRequest(
                    f"Step {step} goes from sigma {sigma:.9g} to {after:.9g}; a rollout's sigmas must fall from at "
                    "most 1 to 0.",
                    field="rollout",
                )
        self._check_indices(len(self.recorded.timesteps))
        self._check_bytes(sample)

    def _check_indices(self, steps: int) -> None:
        if max(self._rollout.sde_steps or [0]) >= steps:
            raise InvalidRequest(f"There are {steps} steps, from 0 on.", field="rollout_sde_step_indices")
        if max(self._rollout.step_indices or [0]) > steps:
            raise InvalidRequest(
                f"{steps} steps have the latents 0 to {steps}, the last of them the final one.",
                field="rollout_return_step_indices",
            )

    def _check_bytes(self, sample: torch.Tensor) -> None:
        rollout, steps = self._rollout, len(self.recorded.timesteps)
        states = steps + 1 if rollout.step_indices is None else len(rollout.step_indices)
        tensors = states * rollout.returns_trajectory + 3 * steps * rollout.returns_debug
        if 4 * sample.numel() * tensors > MAX_BYTES:
            raise InvalidRequest(
                f"The latents and debug tensors of one sample exceed {MAX_BYTES >> 20} MiB; request fewer latents or "
                "fewer steps.",
                field="rollout_return_step_indices",
            )

    def _first_step_refused(self) -> InvalidRequest:
        """The error for a first step near sigma 1 whose noise overflows the model's dtype."""
        rollout, sigmas = self._rollout, self.recorded.sigmas
        return InvalidRequest(
            f"Step 0, from sigma {sigmas[0]:.9g} to {sigmas[1]:.9g}, is not finite with rollout_sde_type "
            f"{rollout.sampler} and noise level {rollout.noise_level:g}; leave it out of rollout_sde_step_indices, or "
            "begin with sigma 1.",
            field="rollout_sde_step_indices",
        )

    def _state_of(self, sample: torch.Tensor) -> torch.Tensor:
        """The state after the last step, in fp32. If the pipeline has changed it since, :meth:`end` refuses."""
        if self._state is None or self._given is None:
            return sample.detach().float().clone()
        given, version = self._given
        if sample is not given or sample._version != version:
            self._unchanged.compare(sample, self._state.to(sample.dtype))
        return self._state

    def _is_noisy(self, number: int) -> bool:
        return self._rollout.sde_steps is None or number in self._rollout.sde_steps

    def _is_requested(self, index: int) -> bool:
        return self._rollout.step_indices is None or index in self._rollout.step_indices

    def _noise(self, x: torch.Tensor, number: int) -> torch.Tensor:
        generator = self._generators(number)
        if generator.device.type == "cpu" and x.device.type == "cuda":  # page-locked, so that nobody waits for the copy
            buffer = pinned(x.numel() * torch.float32.itemsize).view(torch.float32).view(x.shape)
            return torch.randn(x.shape, generator=generator, out=buffer).to(x.device, non_blocking=True)
        return torch.randn(x.shape, generator=generator, device=generator.device).to(x.device)

    def _record(
        self,
        number: int,
        x: torch.Tensor,
        v: torch.Tensor,
        taken: Transition,
        noise: torch.Tensor | None,
        reached: torch.Tensor,
    ) -> None:
        rollout, recorded = self._rollout, self.recorded
        recorded.log_probs.append(taken.log_prob(reached, no_const=rollout.no_const)[0])
        if rollout.returns_trajectory:
            states = {number: x[0], number + 1: reached[0]}
            recorded.latents |= {index: state for index, state in states.items() if self._is_requested(index)}
        if rollout.returns_debug:
            recorded.noises.append((torch.zeros_like(x) if noise is None else noise)[0])
            recorded.means.append(taken.mean[0])
            recorded.outputs.append(v.detach().float()[0])
            recorded.stds.append(taken.std)


@dataclass(frozen=True, slots=True)
class _Stepped:
    prev_sample: torch.Tensor


def _name(scheduler: SchedulerMixin, rollout: Rollout) -> str:
    own = type(scheduler).__name__
    return rollout.sampler if own == _EULER else f"{rollout.sampler} (flow-matching Euler in place of {own})"
